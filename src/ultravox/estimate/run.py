"""What each stage of a run will take: parameters, memory on each rank, tokens a second, hours."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ultravox.config.schema import RunConfig, StageConfig
from ultravox.errors import ConfigError
from ultravox.estimate.batch import Batch, largest_batch
from ultravox.estimate.skeleton import build_skeleton, weightless
from ultravox.model.adapters import lora_layers
from ultravox.model.modeling import UltravoxModel
from ultravox.model.performance import checkpoint_activations, choose_attention
from ultravox.training.engines.layers import decoder_layers
from ultravox.training.speech_task import PARTS
from ultravox.training.stage import TASKS

FORMAT_VERSION = 1
#: Float32 numbers that an optimizer keeps for each one that trains, in bytes.
STATE_BYTES = {"adamw": 8.0, "adamw_schedule_free": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256}
ZERO = ("zero2", "zero3")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each rank."""

    weights: int
    gradients: int
    optimizer: int
    """Moments, and float32 copies of what trains in 16 bits."""
    activations: int
    update: int
    """Gradients in float32 while weights are updated, where they are of 16 bits."""
    evaluation: int
    """The whole model's weights, and the optimizer's state, where ranks hold parts: each evaluates by itself."""

    @property
    def total(self) -> int:
        """At the worst moment."""
        standing = self.weights + self.optimizer
        return max(standing + self.gradients + max(self.activations, self.update), self.evaluation)


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """Of one stage."""

    name: str
    objective: str
    parameters: dict[str, int]
    """Of each part of the model."""
    trainable: dict[str, int]
    memory: Memory
    batch: Batch
    tokens_per_second: float | None
    """Positions of all ranks; None where the device's rate is not known."""
    audio_seconds_per_second: float | None
    hours: float | None

    def to_json(self) -> dict[str, Any]:
        """For machines to read."""
        found = asdict(self)
        found["memory"]["total"] = self.memory.total
        return found


def estimate_run(
    config: RunConfig,
    *,
    ranks: int = 1,
    flops_per_second: float | None = None,
    clip_seconds: float = 10.0,
    text_tokens: int = 60,
) -> list[StageEstimate]:
    """Of each stage, from shapes alone: nothing is fetched but a model's configuration.

    Args:
        config: of the run.
        ranks: processes, of one GPU each.
        flops_per_second: that a rank reaches; None = not known.
        clip_seconds, text_tokens: of each row of a batch.

    Raises:
        ModelError: a model of which no shapes are to be had.
        ConfigError: an engine that does not fit the ranks, or a batch that holds no such row.
    """
    kind = config.engine.kind
    if kind == "auto":
        kind = "ddp" if ranks > 1 else "single"
    if (kind == "single") != (ranks == 1):
        raise ConfigError(f"engine.kind {kind} does not fit {ranks} processes: set --ranks, or engine.kind auto")
    if config.model.projector == "ctc_compressed":
        raise ConfigError(
            "projector ctc_compressed makes as many positions as it hears, which shapes alone do not tell: estimate "
            "ctc_weighted, which makes the most that there can be"
        )
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    found = []
    with weightless(dtype):
        model = build_skeleton(config.model)
        run_as_configured(model, config)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for stage in config.stages:
            choose_trainable(trainable, stage)
            batch = largest_batch(model, stage, clip_seconds, text_tokens)
            memory = _memory(model, stage, kind, ranks, batch.activation_bytes)
            seconds = None if flops_per_second is None else batch.flops / flops_per_second
            positions = batch.tokens * ranks
            found.append(
                StageEstimate(
                    stage.name,
                    stage.objective,
                    _count(model, trains=False),
                    _count(model, trains=True),
                    memory,
                    batch,
                    None if seconds is None else positions / seconds,
                    None if seconds is None else batch.rows * batch.seconds * ranks / seconds,
                    None if seconds is None else stage.max_steps * stage.accumulation_steps * seconds / ranks / 3600,
                )
            )
    return found


def run_as_configured(model: UltravoxModel, config: RunConfig) -> None:
    """What of `run_efficiently` changes how much a model holds, on a GPU."""
    performance = config.performance
    if performance.attention in ("eager", "sdpa"):
        choose_attention(model.language_model, performance.attention)
    if performance.checkpoint_language_model:
        checkpoint_activations(model.language_model, "checkpoint_language_model")
    for part in model.audio_tower.parts if performance.checkpoint_audio_encoder else ():
        inner = part if hasattr(part, "gradient_checkpointing_enable") else part.encoder
        checkpoint_activations(inner, "checkpoint_audio_encoder")


def choose_trainable(trainable: dict[str, nn.Parameter], stage: StageConfig) -> None:
    """Let those train that do in a stage, as `SpeechTask.parameter_groups` does."""
    parts = [part for part in TASKS[stage.objective].parts if getattr(stage.optim.lr, part) > 0]
    prefixes = tuple(prefix for part in parts for prefix in _prefixes(PARTS[part]))
    for name, parameter in trainable.items():
        parameter.grad = None
        parameter.requires_grad_(name.startswith(prefixes))


def _prefixes(prefix: str | tuple[str, ...]) -> tuple[str, ...]:
    return (prefix,) if isinstance(prefix, str) else prefix


def _count(model: UltravoxModel, *, trains: bool) -> dict[str, int]:
    """Parameters of each part, or those that train; a tied table counts once."""
    adapters = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    counts = {"audio_encoder": 0, "projector": 0, "language_model": 0, "adapters": 0}
    for name, parameter in model.named_parameters():
        if trains and not parameter.requires_grad:
            continue
        part = next((part for part, prefix in PARTS.items() if name.startswith(_prefixes(prefix))), "language_model")
        counts["adapters" if id(parameter) in adapters else part] += parameter.numel()
    return counts


def _memory(model: UltravoxModel, stage: StageConfig, kind: str, ranks: int, activations: int) -> Memory:
    layers = decoder_layers(model) if kind in ("fsdp2", "zero3") else []
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    everything = [*model.parameters(), *model.buffers()]
    of_layers = sum(_bytes(p) for p in everything if id(p) in in_layers)
    whole = sum(map(_bytes, everything))
    one_layer = max((sum(map(_bytes, layer.parameters())) for layer in layers), default=0)
    # the next layer is gathered while one runs (FSDP2); DeepSpeed gathers none ahead of time here
    gathered = {"fsdp2": 2, "zero3": 1}.get(kind, 0) * one_layer
    weights = whole - of_layers + min(of_layers // ranks + gathered, of_layers)
    gradients, states, update = 0.0, 0.0, 0.0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        size, number = float(_bytes(parameter)), float(parameter.numel())
        is_rounded = parameter.element_size() < 4
        if kind in ZERO:  # gradients stay whole until the step's end; float32 copies, moments, sums in parts
            gradients += size
            states += number * (4 + STATE_BYTES[stage.optim.optimizer] + 4) / ranks
            update += number * 4 / ranks
        else:
            share = ranks if kind == "fsdp2" and id(parameter) in in_layers else 1
            gradients += size / share
            states += number * (STATE_BYTES[stage.optim.optimizer] + 4 * is_rounded) / share
            update += number * 4 * is_rounded / share
    evaluation = whole + states if kind in ("fsdp2", "zero3") else 0.0
    return Memory(weights, round(gradients), round(states), activations, round(update), round(evaluation))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
