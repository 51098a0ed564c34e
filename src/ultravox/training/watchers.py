"""What watches a stage while it trains: logs, the terminal, and which example went where."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from ultravox.config.schema import RunConfig, StageConfig
from ultravox.data.sample_log import SampleLog, next_attempt
from ultravox.training.engines.base import Engine
from ultravox.training.progress import TerminalProgress
from ultravox.training.rows import source_key
from ultravox.training.speech import SpeechData
from ultravox.training.trackers.jsonl import JsonLinesLog
from ultravox.training.trackers.samples import StepSamples, samples_folder
from ultravox.training.trackers.tensorboard import TensorBoardLog, tensorboard_is_installed
from ultravox.training.trackers.tracking import RunTracking, StageTracking
from ultravox.training.trainer import LoopState


class _Last:
    """Remembers the last loss and evaluation, for the summary."""

    def __init__(self, values: dict[str, float], evaluated: dict[int, dict[str, float]]) -> None:
        self.values, self.evaluated = values, evaluated

    def on_step(self, record: Any) -> None:
        self.values["loss"] = record.loss

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.values.update(metrics)
        self.evaluated.clear()
        self.evaluated[step] = metrics


def watch_stage(
    config: RunConfig,
    stage: StageConfig,
    data: SpeechData,
    engine: Engine,
    state: LoopState,
    last: dict[str, float],
    evaluated: dict[int, dict[str, float]],
    stack: ExitStack,
) -> Sequence[Any]:
    """The callbacks of one stage on one rank; `stack` closes each, also when the next one cannot be made.

    The main rank writes the logs; each one says which examples it had, if that is asked for. `last` gets the last loss
    and evaluation, `evaluated` the last evaluation by its step.
    """
    run_dir = Path(config.run_dir)
    callbacks: list[Any] = []

    def add(callback: Any) -> None:
        stack.callback(callback.close)
        callbacks.append(callback)

    if config.logging.samples:
        folder = samples_folder(run_dir, stage.name)
        attempt = engine.gather(next_attempt(folder))[0]
        log = SampleLog(folder, rank=engine.rank, world_size=engine.world_size, attempt=attempt, first_step=state.step)
        names = [source_key(source) for source in data.sources]
        add(StepSamples(log, names, streamed=config.data.streaming))
    if not engine.is_main:
        return [*callbacks, _Last(last, evaluated)]
    add(JsonLinesLog(run_dir / "log.jsonl", stage.log_every, state.seconds))
    if config.logging.tensorboard:
        if tensorboard_is_installed():
            folder = run_dir / "tensorboard" / stage.name
            add(TensorBoardLog(folder, stage.log_every, state.step, state.seconds))
        else:
            Console(stderr=True).print("TensorBoard is not installed: no tensorboard/ is written; log.jsonl is")
    add(TerminalProgress(stage.name, stage.max_steps, stage.log_every, elapsed_seconds=state.seconds))
    return [*callbacks, _Last(last, evaluated)]


def track_stage(config: RunConfig, stage: StageConfig, tracking: RunTracking, state: LoopState) -> StageTracking:
    """The run's trackers, told of this stage. Their steps go on over the stages."""
    first_step = sum(other.max_steps for other in config.stages[: config.stages.index(stage)])
    return StageTracking(
        tracking.started,
        stage.log_every,
        first_step=first_step,
        elapsed_seconds=state.seconds,
        num_transcripts=config.logging.num_transcripts,
    )
