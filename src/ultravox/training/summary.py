"""What a run says about itself: the line before it begins, and ``train.json``."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from ultravox.config.schema import StageConfig
from ultravox.data.order import Position
from ultravox.training.engines.ranks import is_main_process
from ultravox.training.flops import num_matmul_parameters
from ultravox.training.measure import MatmulRate, memory_bytes, peak_memory_bytes
from ultravox.training.speech import SpeechData
from ultravox.training.speech_task import SpeechTask
from ultravox.training.trainer import LoopState

FORMAT_VERSION = 1


@dataclass(slots=True)
class RunState:
    """Where a run stands between its stages; part of each checkpoint."""

    seconds: float = 0.0
    """Wall time of training before this process."""
    feature_cache_seconds: float = 0.0
    peak_memory_bytes: int = 0
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Summaries of the stages that are done."""
    init_from: dict[str, str] | None = None
    """Place and hash of the weights that the run began with; None = fresh ones."""


def stage_summary(
    stage: StageConfig, task: SpeechTask, state: LoopState, last: dict[str, float], matmul: MatmulRate | None
) -> dict[str, Any]:
    """What train.json says about a stage. Rates are over its whole wall time, evaluations and checkpoints included.

    Args:
        stage: that is done.
        task: of the stage.
        state: where it stands.
        last: its last loss and evaluation.
        matmul: rate of matrix products while it ran; None = they are not its measure.
    """
    position = Position(state.epoch, state.window, state.batch)
    summary = {
        "name": stage.name,
        "objective": stage.objective,
        "steps": state.step,
        "skipped_steps": state.skipped,
        "seconds": state.seconds,
        "evaluation_seconds": state.evaluation_seconds,
        "data_wait_seconds": state.data_wait_seconds,
        "data_wait_share": state.data_wait_seconds / max(state.seconds, 1e-9),
        "epochs": task.order.epochs(position),
        "mixture": task.mixture(position),
        "num_examples": None if task.data.stream else len(task.examples),  # nobody has counted them
        "left_out": task.left_out,
        "audio_seconds": state.audio_seconds,
        "audio_seconds_per_second": state.audio_seconds / max(state.seconds, 1e-9),
        "num_tokens": state.num_tokens,
        "tokens_per_second": state.num_tokens / max(state.seconds, 1e-9),
        **{f"final_{name}": value for name, value in last.items()},
    }
    if matmul is not None:
        summary |= matmul.shares(num_matmul_parameters(task.model.language_model), state.num_tokens, state.seconds)
    return summary


def run_summary(run: RunState, data: SpeechData, begin: float) -> dict[str, Any]:
    """What train.json says; `begin` is when this process began, by the monotonic clock."""
    return {
        "version": FORMAT_VERSION,
        "train_seconds": run.seconds + time.monotonic() - begin,
        "feature_cache_seconds": run.feature_cache_seconds,
        "peak_memory_bytes": max(run.peak_memory_bytes, peak_memory_bytes()),
        "num_threads": torch.get_num_threads(),
        "num_clips": None if data.stream else len(data.examples),
        "audio_seconds": None if data.stream else data.seconds,
        "num_progress_clips": len(data.progress_examples),
        "num_with_progress_text": data.num_same_text,
        "quarantined": data.quarantine.counts(),
        "quarantined_files": data.quarantine.reasons,
        "num_trainable_parameters": sum(parameter.numel() for parameter in data.trainable.values()),
        "stages": run.finished,
        **({} if run.init_from is None else {"init_from": run.init_from}),
    }


def tell_mixture(stage: str, mixture: dict[str, dict[str, float]]) -> None:
    """What came of each source, beside what was asked for."""
    shares = [f"{name} {share['realised']:.1%} (asked {share['requested']:.1%})" for name, share in mixture.items()]
    if len(shares) > 1:
        text = f"stage {stage}: of the examples, {', '.join(shares)}"
        tell(text)


def announce(model: Any, data: SpeechData) -> None:
    """What there is to train on, and how much of the model trains."""
    count = sum(parameter.numel() for parameter in data.trainable.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    text = (
        f"{data.describe()}; {count / 1e6:.1f} of {total / 1e6:.0f} M parameters train; "
        f"{memory_bytes() / 1e9:.1f} GB of memory"
    )
    tell(text)


def tell(text: str) -> None:
    """A line on standard error, once for all processes of a run."""
    if not is_main_process():
        return
    Console(stderr=True).print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
