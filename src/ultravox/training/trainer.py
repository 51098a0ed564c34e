"""The training loop. It asks a task for batches and losses and knows no model; callbacks watch it and know neither."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from ultravox.errors import UltravoxError
from ultravox.metrics.token_predictions import PredictionCounts, pool_predictions
from ultravox.training.interrupt import StopRequest, TrainingInterrupted
from ultravox.training.optim import Optimizer, lr_factor
from ultravox.training.splitting import run_with_splitting
from ultravox.training.task import LoadedBatch, LoadedStep, LossOutput, Task, Transcript

#: A loss so many times the usual one is a spike; the usual one is a running mean over about 1 / SMOOTHING steps.
SPIKE_FACTOR = 3.0
SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How long and how fast one stage goes. `*_every` = 0 means at the end of the stage only."""

    stage: str
    max_steps: int
    warmup_steps: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_share: float = 0.0
    max_grad_norm: float = 1.0
    evaluate_every: int = 0
    checkpoint_every: int = 0
    measure_every: int = 0
    """Steps between two looks at each part's gradient and update; 0 = never."""
    max_skipped_steps: int = 5
    """So many steps in a row without a finite loss and gradient end the run."""

    def evaluates_after(self, step: int) -> bool:
        """Whether it is time for a look at progress, apart from the one at the end; none just before that one."""
        every = self.evaluate_every
        return every > 0 and step % every == 0 and self.max_steps - step >= every / 2

    def lr_factor(self, step: int) -> float:
        """What the peak learning rates are multiplied by in the step after `step`."""
        return lr_factor(
            step,
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
            schedule=self.schedule,
            final_share=self.final_lr_share,
        )


@dataclass(slots=True)
class LoopState:
    """Where a stage stands: all that the loop needs to go on, beside weights, moments and random states."""

    step: int = 0
    epoch: int = 0
    window: int = 0
    batch: int = 0
    skipped_in_row: int = 0
    skipped: int = 0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    """How long steps have waited for their batches."""
    audio_seconds: float = 0.0
    num_tokens: int = 0
    usual_loss: float = 0.0
    """Running mean, to tell a spike by; 0 before the first step."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class StepRecord:
    """What callbacks are told after each optimizer step."""

    stage: str
    step: int
    max_steps: int
    loss: float
    lr: dict[str, float]
    grad_norm: float
    audio_seconds: float
    num_tokens: int
    elapsed_seconds: float
    """In this stage, over all its resumptions."""
    data_wait_seconds: float = 0.0
    """In this step."""
    batches: Sequence[LoadedBatch] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    of_parts: dict[str, float] = field(default_factory=dict)
    """`grad_norm_<part>` and `update_ratio_<part>`, in the steps in which they are measured."""
    predictions: PredictionCounts | None = None
    """The best tokens against the labels, where the objective predicts tokens."""
    skipped_ids: list[str] | None = None
    """The examples of a step that was not taken, because its loss or gradient was not finite."""
    spike_ids: list[str] | None = None
    """The examples of a step whose loss stands far above the usual."""
    split_ids: list[list[str]] | None = None
    """The examples of each batch that did not fit into memory, and was run in halves."""


class Callback(Protocol):
    """Watches the loop."""

    def on_step(self, record: StepRecord) -> None: ...

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None: ...


@runtime_checkable
class ShowsTranscripts(Protocol):
    """A callback that also wants to see what an evaluation was about."""

    def on_transcripts(self, stage: str, step: int, transcripts: Sequence[Transcript]) -> None: ...


def run_stage(
    task: Task,
    optimizer: Optimizer,
    settings: LoopSettings,
    load: Callable[[LoopState], Iterator[LoadedStep]],
    *,
    state: LoopState | None = None,
    callbacks: Sequence[Callback] = (),
    save: Callable[[LoopState], None] = lambda state: None,
    stop: StopRequest | None = None,
) -> LoopState:
    """Train one stage to its last step.

    Args:
        task: the objective.
        optimizer: over the task's parameter groups.
        settings: of the stage.
        load: the endless steps' batches, from a state's epoch, window and batch on.
        state: where to go on; None = at the beginning.
        callbacks: watchers.
        save: writes a checkpoint; called at `checkpoint_every`, at the end, and before stopping on a signal.
        stop: a signal's request to end after the step in hand.

    Raises:
        TrainingInterrupted: after a signal, once saved.
        UltravoxError: `max_skipped_steps` in a row were not finite.
    """
    state = state or LoopState()
    begin = time.monotonic() - state.seconds
    task.train_mode()
    with closing(load(state)) as steps:  # type: ignore[type-var]
        _run(task, optimizer, settings, steps, state, begin, callbacks, save, stop)
    return state


def _run(
    task: Task,
    optimizer: Optimizer,
    settings: LoopSettings,
    steps: Iterator[LoadedStep],
    state: LoopState,
    begin: float,
    callbacks: Sequence[Callback],
    save: Callable[[LoopState], None],
    stop: StopRequest | None,
) -> None:
    while state.step < settings.max_steps:
        waiting = time.monotonic()
        loaded = next(steps)
        wait = time.monotonic() - waiting
        record = _step(task, optimizer, settings, state, loaded)
        record.data_wait_seconds = wait
        state.data_wait_seconds += wait
        state.seconds = record.elapsed_seconds = time.monotonic() - begin
        for callback in callbacks:
            callback.on_step(record)
        if state.skipped_in_row >= settings.max_skipped_steps:
            raise UltravoxError(
                f"stage {settings.stage}: the loss was not finite in {state.skipped_in_row} steps in a row, up to step "
                f"{state.step} with {', '.join((record.skipped_ids or [])[:5])}: lower the learning rate, or look at "
                f"these clips"
            )
        last = state.step == settings.max_steps
        if last or settings.evaluates_after(state.step):
            _evaluate(task, settings, state, callbacks)
        state.seconds = time.monotonic() - begin
        if last or stop or (settings.checkpoint_every and state.step % settings.checkpoint_every == 0):
            save(state)
        if stop and not last:
            assert stop.signal_number is not None
            raise TrainingInterrupted(stop.signal_number)


def _step(task: Task, optimizer: Optimizer, settings: LoopSettings, state: LoopState, loaded: LoadedStep) -> StepRecord:
    """One optimizer step: gradients of the loss sums of all micro-batches, divided by their common count."""
    optimizer.zero_grad()
    loss_sum = count = audio_seconds = 0.0
    num_tokens = 0
    metrics: dict[str, float] = {}
    means: dict[str, tuple[float, float]] = {}
    ids: list[str] = []
    splits: list[list[str]] = []
    predictions: list[PredictionCounts] = []
    for batch in (item.batch for item in loaded.batches):
        ids.extend(batch.ids)
        outputs = run_with_splitting(
            partial(_forward_and_backward, task),
            batch,
            task.halves,
            lambda whole, _: splits.append(list(whole.ids)),
            parameters=optimizer.parameters,
        )
        for output in outputs:
            loss_sum += output.sum.item()
            count += output.count
            audio_seconds += output.audio_seconds
            num_tokens += output.num_tokens
            if output.predictions is not None:
                predictions.append(output.predictions)
            for name, number in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + number
            for name, (part, number) in output.means.items():
                before = means.get(name, (0.0, 0.0))
                means[name] = (before[0] + part, before[1] + number)
    state.epoch, state.window, state.batch = loaded.after
    factor = settings.lr_factor(state.step)
    norm = math.nan
    if math.isfinite(loss_sum) and count > 0:
        every = settings.measure_every
        measure = bool(every) and ((state.step + 1) % every == 0 or state.step + 1 == settings.max_steps)
        norm = optimizer.step(divisor=count, max_grad_norm=settings.max_grad_norm, lr_factor=factor, measure=measure)
    taken = math.isfinite(norm)
    state.step += 1
    state.skipped_in_row = 0 if taken else state.skipped_in_row + 1
    state.skipped += not taken
    state.audio_seconds += audio_seconds
    state.num_tokens += num_tokens
    loss = loss_sum / count if count else math.nan
    is_spike = state.step > 1 / SMOOTHING and loss > SPIKE_FACTOR * state.usual_loss
    if taken:
        state.usual_loss += (SMOOTHING if state.usual_loss else 1.0) * (loss - state.usual_loss)
    return StepRecord(
        stage=settings.stage,
        step=state.step,
        max_steps=settings.max_steps,
        loss=loss,
        lr={group.part: group.lr * factor for group in optimizer.groups},
        grad_norm=norm,
        audio_seconds=audio_seconds,
        num_tokens=num_tokens,
        elapsed_seconds=0.0,
        batches=loaded.batches,
        metrics={name: number / count for name, number in metrics.items() if count}
        | {name: part / number for name, (part, number) in means.items() if number},
        of_parts=optimizer.measured if taken else {},
        predictions=pool_predictions(predictions) if predictions else None,
        skipped_ids=None if taken else ids,
        spike_ids=ids if taken and is_spike else None,
        split_ids=splits or None,
    )


def _forward_and_backward(task: Task, batch: Any) -> LossOutput:
    """Loss of a batch, whose gradients are added to what is there; the graph is gone afterwards."""
    output = task.loss(batch)
    if output.sum.requires_grad and math.isfinite(output.sum.item()):
        output.sum.backward()
    output.sum = output.sum.detach()
    return output


def _evaluate(task: Task, settings: LoopSettings, state: LoopState, callbacks: Sequence[Callback]) -> None:
    """Look at progress without disturbing training: the random state is put back."""
    start = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        metrics = task.evaluate()
    task.train_mode()
    state.evaluation_seconds += time.monotonic() - start
    for callback in callbacks:
        callback.on_evaluation(settings.stage, state.step, metrics)
        if isinstance(callback, ShowsTranscripts):
            callback.on_transcripts(settings.stage, state.step, task.transcripts())
