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
from ultravox.training.engines.base import Engine
from ultravox.training.interrupt import Reason, StopRequest, TrainingInterrupted
from ultravox.training.loss_scale import FIRST_SCALE, LEAST_SCALE, next_scale
from ultravox.training.memory import empty_cache
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
    scales_loss: bool = False
    """Whether gradients are of 16 bits with 5 for the exponent: see `loss_scale`."""
    empty_cache_every: int = 0
    """Steps between two returns of freed memory; 0 = never."""
    peak_flops: float | None = None
    """FLOP per second that all ranks can at best; None = not known."""

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
    loss_scale: float = 1.0
    """What losses are multiplied by before they run backwards, and gradients divided by afterwards."""
    steps_at_scale: int = 0
    """Taken since it was changed."""

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
    """Positions without padding."""
    elapsed_seconds: float
    """In this stage, over all its resumptions."""
    data_wait_seconds: float = 0.0
    """In this step."""
    num_positions: int = 0
    """With padding."""
    flops: float = 0.0
    """Of the model's matrix products."""
    peak_flops: float | None = None
    """FLOP per second that the ranks can at best."""
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
    stop_reason: Reason | None = None
    """Why a rank is to stop, and so all."""


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
    settle: Callable[[], None] = lambda: None,
    stop: StopRequest | None = None,
    engine: Engine | None = None,
) -> LoopState:
    """Train one stage to its last step.

    Args:
        task: the objective.
        optimizer: over the task's parameter groups.
        settings: of the stage.
        load: the endless steps' batches, from a state's epoch, window and batch on.
        state: where to go on; None = at the beginning.
        callbacks: watchers.
        save: writes a checkpoint; called at `checkpoint_every`, at the end, and before stopping.
        settle: waits until what was saved no longer needs the weights and moments; called before they change.
        stop: a request to end after the step in hand; one rank's is all ranks'.
        engine: shares the steps with other ranks, on which the same stage runs; None = this process by itself.

    Raises:
        TrainingInterrupted: after such a request, once saved.
        UltravoxError: `max_skipped_steps` in a row were not finite.
    """
    state = state or LoopState()
    begin = time.monotonic() - state.seconds
    task.train_mode()
    with closing(load(state)) as steps:  # type: ignore[type-var]
        if settings.scales_loss and not state.step:
            state.loss_scale = FIRST_SCALE
        loop = _Loop(task, optimizer, settings, engine or Engine(), StopRequest() if stop is None else stop, settle)
        loop.run(steps, state, begin, callbacks, save)
    return state


@dataclass(slots=True)
class _Counts:
    """What a rank has added up in a step, or all ranks together."""

    loss_sum: float = 0.0
    count: float = 0.0
    audio_seconds: float = 0.0
    num_tokens: int = 0
    num_positions: int = 0
    flops: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    means: dict[str, tuple[float, float]] = field(default_factory=dict)
    ids: list[str] = field(default_factory=list)
    splits: list[list[str]] = field(default_factory=list)
    predictions: list[PredictionCounts] = field(default_factory=list)
    stop_reason: Reason | None = None

    def add(self, output: LossOutput) -> None:
        """One micro-batch."""
        found = [] if output.predictions is None else [output.predictions]
        more = _Counts(
            output.sum.item(),
            output.count,
            output.audio_seconds,
            output.num_tokens,
            output.num_positions,
            output.flops,
            output.metrics,
            output.means,
        )
        self.join(more)
        self.predictions += found

    def join(self, other: "_Counts") -> None:
        """More of the same step."""
        self.loss_sum += other.loss_sum
        self.count += other.count
        self.audio_seconds += other.audio_seconds
        self.num_tokens += other.num_tokens
        self.num_positions += other.num_positions
        self.flops += other.flops
        for name, number in other.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + number
        for name, (part, number) in other.means.items():
            before = self.means.get(name, (0.0, 0.0))
            self.means[name] = (before[0] + part, before[1] + number)
        self.ids += other.ids
        self.splits += other.splits
        self.predictions += other.predictions
        self.stop_reason = self.stop_reason or other.stop_reason


@dataclass(slots=True)
class _Loop:
    """One stage's steps."""

    task: Task
    optimizer: Optimizer
    settings: LoopSettings
    engine: Engine
    stop: StopRequest
    settle: Callable[[], None] = lambda: None

    def run(
        self,
        steps: Iterator[LoadedStep],
        state: LoopState,
        begin: float,
        callbacks: Sequence[Callback],
        save: Callable[[LoopState], None],
    ) -> None:
        settings = self.settings
        while state.step < settings.max_steps:
            with self.engine.watch():
                waiting = time.monotonic()
                loaded = next(steps)
                wait = time.monotonic() - waiting
                record = self._step(state, loaded)
            record.data_wait_seconds = wait
            state.data_wait_seconds += wait
            state.seconds = record.elapsed_seconds = time.monotonic() - begin
            for callback in callbacks:
                callback.on_step(record)
            if state.skipped_in_row >= settings.max_skipped_steps:
                raise UltravoxError(
                    f"stage {settings.stage}: the loss was not finite in {state.skipped_in_row} steps in a row, up to "
                    f"step {state.step} with {', '.join((record.skipped_ids or [])[:5])}: lower the learning rate, or "
                    f"look at these clips"
                )
            last = state.step == settings.max_steps
            if last or settings.evaluates_after(state.step):
                self._evaluate(state, callbacks)
            state.seconds = time.monotonic() - begin
            # also of a signal during the evaluation; among ranks, all must know of it
            reason = self.stop.reason if self.engine.world_size == 1 else record.stop_reason
            due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
            if last or reason is not None or due:
                with self.optimizer.averaged():
                    save(state)
            if settings.empty_cache_every and state.step % settings.empty_cache_every == 0:
                empty_cache(self.engine.device)
            if reason is not None and not last:
                raise TrainingInterrupted(reason)

    def _step(self, state: LoopState, loaded: LoadedStep) -> StepRecord:
        """One optimizer step: gradients of the loss sums of all micro-batches, divided by their common count."""
        self.optimizer.zero_grad()
        mine = _Counts()
        for batch in (item.batch for item in loaded.batches):
            mine.ids += batch.ids
            for output in self._outputs(batch, mine.splits, state.loss_scale):
                mine.add(output)
        mine.stop_reason = self.stop.look()
        counts = _Counts()
        for found in self.engine.gather(mine):
            counts.join(found)
        state.epoch, state.window, state.batch = loaded.after
        scale = state.loss_scale
        norm = self._update(state.step, counts, scale)
        state.step += 1
        taken = math.isfinite(norm)
        overflowed = not taken and self.settings.scales_loss and math.isfinite(counts.loss_sum) and counts.count > 0
        if self.settings.scales_loss:
            state.loss_scale, state.steps_at_scale = next_scale(scale, state.steps_at_scale, overflowed=overflowed)
            counts.means["loss_scale"] = (scale, 1.0)
        if taken:
            state.skipped_in_row = 0
        elif not (overflowed and scale > LEAST_SCALE):  # the search for the right scale is no fault of the data
            state.skipped_in_row += 1
        state.skipped += not taken
        state.audio_seconds += counts.audio_seconds
        state.num_tokens += counts.num_tokens
        loss = counts.loss_sum / counts.count if counts.count else math.nan
        is_spike = state.step > 1 / SMOOTHING and loss > SPIKE_FACTOR * state.usual_loss
        if taken:
            state.usual_loss += (SMOOTHING if state.usual_loss else 1.0) * (loss - state.usual_loss)
        factor = self.settings.lr_factor(state.step - 1)
        return StepRecord(
            stage=self.settings.stage,
            step=state.step,
            max_steps=self.settings.max_steps,
            loss=loss,
            lr={group.part: group.lr * factor for group in self.optimizer.groups},
            grad_norm=norm,
            audio_seconds=counts.audio_seconds,
            num_tokens=counts.num_tokens,
            elapsed_seconds=0.0,
            num_positions=counts.num_positions,
            flops=counts.flops,
            peak_flops=self.settings.peak_flops,
            batches=loaded.batches,
            metrics={name: number / counts.count for name, number in counts.metrics.items() if counts.count}
            | {name: part / number for name, (part, number) in counts.means.items() if number},
            of_parts=self.optimizer.measured if taken else {},
            predictions=pool_predictions(counts.predictions) if counts.predictions else None,
            skipped_ids=None if taken else counts.ids,
            spike_ids=counts.ids if taken and is_spike else None,
            split_ids=counts.splits or None,
            stop_reason=counts.stop_reason,
        )

    def _outputs(self, batch: Any, splits: list[list[str]], scale: float) -> list[LossOutput]:
        """Forwards and backwards through a batch, in halves where it does not fit into memory."""
        run = partial(_forward_and_backward, self.task, self.engine, scale)
        if self.engine.is_sharded:  # halves of one rank would be passes that the other ranks do not make
            return [run(batch)]
        return run_with_splitting(
            run,
            batch,
            self.task.halves,
            lambda whole, _: splits.append(list(whole.ids)),
            parameters=self.optimizer.parameters,
        )

    def _update(self, step: int, counts: _Counts, scale: float) -> float:
        """The gradient's norm before clipping; where it, or the loss, is not finite on any rank, none is updated."""
        settings = self.settings
        self.engine.reduce(self.optimizer.parameters)
        if not (math.isfinite(counts.loss_sum) and counts.count > 0):
            return math.nan
        self.settle()
        every = settings.measure_every
        measure = bool(every) and ((step + 1) % every == 0 or step + 1 == settings.max_steps)
        return self.optimizer.step(
            divisor=counts.count * scale,
            max_grad_norm=settings.max_grad_norm,
            lr_factor=settings.lr_factor(step),
            measure=measure,
        )

    def _evaluate(self, state: LoopState, callbacks: Sequence[Callback]) -> None:
        """Look at progress without disturbing training: the random state is put back. Each rank does all of it."""
        start = time.monotonic()
        devices = [self.engine.device] if self.engine.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.optimizer.averaged(), self.engine.whole_weights():
            metrics = self.task.evaluate()
        self.task.train_mode()
        state.evaluation_seconds += time.monotonic() - start
        for callback in callbacks:
            callback.on_evaluation(self.settings.stage, state.step, metrics)
            if isinstance(callback, ShowsTranscripts):
                callback.on_transcripts(self.settings.stage, state.step, self.task.transcripts())


def _forward_and_backward(task: Task, engine: Engine, scale: float, batch: Any) -> LossOutput:
    """Loss of a batch, whose gradients, `scale` times as large, are added to what is there; the graph is gone after."""
    output = task.loss(batch)
    if output.sum.requires_grad and (engine.is_sharded or math.isfinite(output.sum.item())):
        engine.backward(output.sum if scale == 1 else output.sum * scale)
    output.sum = output.sum.detach()
    return output
