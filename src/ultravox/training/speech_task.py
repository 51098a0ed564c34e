"""What the tasks on speech have in common: batches of examples, features, parameter groups, the trainable state."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ultravox.audio.lengths import num_audio_tokens
from ultravox.config.schema import StageConfig
from ultravox.data.mixture import Mixture
from ultravox.data.order import DataOrder, OrderPosition
from ultravox.data.plan import Limits
from ultravox.errors import CheckpointError
from ultravox.metrics.error_rate import word_error_rate
from ultravox.training.optim import ParameterGroup
from ultravox.training.speech import Example, SpeechData, augment
from ultravox.training.task import LossOutput, Position

PARTS = {"projector": "multi_modal_projector.", "language_model": "language_model.", "audio_encoder": "audio_tower."}


@dataclass(slots=True)
class SpeechBatch:
    """Examples at a speed each, and what the cache keeps of them."""

    ids: list[str]
    examples: list[Example]
    versions: list[int]
    values: Tensor
    """[window, step, channel]."""
    lengths: Tensor
    """[window]."""
    augment_seed: tuple[int | str, ...]

    @property
    def audio_seconds(self) -> float:
        return sum(example.seconds[version] for example, version in zip(self.examples, self.versions, strict=True))


def _mixture(examples: Sequence[Example], seed: int) -> Mixture:
    """What an epoch is made of: each example as often as its source says."""
    runs = [(key, len(list(run))) for key, run in groupby(examples, key=lambda e: (e.source, e.repeat))]
    names = [f"{source} ({index})" for index, ((source, _), _) in enumerate(runs)]
    sizes = {name: size for name, (_, size) in zip(names, runs, strict=True)}
    repeats = {name: repeat for name, ((_, repeat), _) in zip(names, runs, strict=True)}
    return Mixture(sizes, repeats=repeats, seed=seed)


class SpeechTask(abc.ABC):
    """A task on a model that hears. Subclasses choose the examples, their lengths and the loss."""

    parts: tuple[str, ...]
    """Parts of the model that this objective trains, where they train at all."""
    budget_counts_padding: bool = True
    """Whether padding counts in `max_batch_tokens`; packed rows have none."""

    def __init__(self, model: Any, processor: Any, data: SpeechData, stage: StageConfig, seed: int) -> None:
        self.model, self.tokenizer, self.data, self.stage, self.seed = model, processor.tokenizer, data, stage, seed
        self.features, self.stack_factor = data.features, model.config.stack_factor
        self.trainable = data.trainable
        self.extra: nn.Module | None = None
        """Parameters of the objective itself."""
        self.left_out: list[str] = []
        """The example of each version that this objective cannot use."""
        chosen = [e for e in data.examples if stage.sources is None or e.source in stage.sources]
        self.examples, lengths = self._select(chosen)
        limits = Limits(stage.max_batch_tokens, "padded" if self.budget_counts_padding else "packed")
        tokens = np.asarray(lengths, dtype=np.int32)
        no_text = np.zeros((len(tokens), 1), dtype=np.int32)
        self._order = DataOrder(tokens, no_text, _mixture(self.examples, seed), limits, seed=seed)

    @abc.abstractmethod
    def _select(self, examples: list[Example]) -> tuple[list[Example], list[list[int]]]:
        """The examples that can be trained on, and the tokens of each of their versions (0 = left out)."""

    @abc.abstractmethod
    def loss(self, batch: SpeechBatch) -> LossOutput:
        """Forward pass."""

    @abc.abstractmethod
    def transcribe(self, examples: list[Example]) -> list[str]:
        """What the model makes of each example's first version."""

    def audio_tokens(self, example: Example, version: int) -> int:
        """Language model positions of one version's audio."""
        return sum(num_audio_tokens(frames, self.stack_factor) for frames in example.window_frames[version])

    def num_batches(self, epoch: int) -> int:
        """See `Task`."""
        return sum(self._order.num_batches(epoch, window) for window in range(self._order.num_windows(epoch)))

    def batch(self, position: Position) -> SpeechBatch:
        """See `Task`."""
        place = self._order.position_after(OrderPosition(position.epoch), position.batch)
        items = self._order.batch(place.epoch, place.window, place.batch)
        examples, versions = [self.examples[row] for row in items.rows], items.versions.tolist()
        return self.load(examples, versions, (self.seed, self.stage.name, position.epoch, position.batch))

    def load(
        self, examples: Sequence[Example], versions: Sequence[int], seed: tuple[int | str, ...] = ()
    ) -> SpeechBatch:
        """Examples at chosen versions."""
        names = [example.names[version] for example, version in zip(examples, versions, strict=True)]
        values, lengths = self.features.load(names)
        return SpeechBatch([e.id for e in examples], list(examples), list(versions), values, lengths, seed)

    def audio_embeddings(self, batch: SpeechBatch, *, augmented: bool) -> tuple[Tensor, Tensor]:
        """Projected audio of a batch: [window, token, hidden] and lengths [window]."""
        frames, lengths = self.features.frames(batch.values, batch.lengths)
        if augmented:
            rate = self.model.audio_tower.frames_per_second
            frames = augment(frames, lengths, self.stage.augment, batch.augment_seed, rate)
        return self.model.project(frames, lengths)

    def parameter_groups(self) -> list[ParameterGroup]:
        """What trains in this stage; a part with rate 0 stands still."""
        groups = []
        for part in self.parts:
            lr = getattr(self.stage.optim.lr, part)
            found = {name: p for name, p in self.trainable.items() if name.startswith(PARTS[part])}
            if part == "projector" and self.extra is not None:
                found |= {f"objective.{name}": p for name, p in self.extra.named_parameters()}
            if lr > 0 and found:
                groups.append(ParameterGroup(part, found, lr))
        training = {name for group in groups for name in group.parameters}
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name in training)
        return groups

    def train_mode(self) -> None:
        """Dropout where the base models have it; a frozen encoder stays as it is for inference."""
        self.model.train()
        self.model.audio_tower.train(self.features.live)

    def evaluate(self) -> dict[str, float]:
        """Word error rate on the clips that were kept out of training."""
        examples = self.data.progress_examples
        if not examples:
            return {}
        self.model.eval()
        with torch.no_grad():
            texts = self.transcribe(examples)
        return {"wer": word_error_rate([example.text for example in examples], texts)}

    def trainable_state(self) -> dict[str, Tensor]:
        """All that trains in any stage, and the objective's own parameters."""
        state = {name: parameter.detach() for name, parameter in self.trainable.items()}
        if self.extra is not None:
            state |= {f"objective.{name}": p.detach() for name, p in self.extra.named_parameters()}
        return state

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `trainable_state`. CheckpointError when names or shapes differ."""
        current = self.trainable_state()
        if odd := sorted(set(current) ^ set(state)):
            where = "only in the checkpoint" if odd[0] in state else "missing in the checkpoint"
            raise CheckpointError(f"the checkpoint does not fit the model: {odd[0]} is {where} ({len(odd)} such)")
        with torch.no_grad():
            for name, tensor in current.items():
                if tensor.shape != state[name].shape:
                    raise CheckpointError(f"{name} has shape {list(state[name].shape)}, expected {list(tensor.shape)}")
                tensor.copy_(state[name])
