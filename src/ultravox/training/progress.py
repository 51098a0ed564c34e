"""Progress in the terminal: a live line where there is one, else a printed line now and then."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ultravox.metrics.token_predictions import PredictionCounts
from ultravox.training.engines.ranks import is_main_process
from ultravox.training.measure import memory_bytes
from ultravox.training.plateau import PlateauNotice
from ultravox.training.trackers.window import Window
from ultravox.training.trainer import StepRecord

SHIFT_STEPS = 20


class TerminalProgress:
    """Stage, step, loss, WER so far, audio-seconds and tokens per second, time left, memory.

    `elapsed_seconds` is how long the stage had trained before it was resumed.
    """

    def __init__(
        self, stage: str, max_steps: int, log_every: int, console: Console | None = None, elapsed_seconds: float = 0.0
    ) -> None:
        self.console = console or Console(stderr=True)
        self._log_every, self._window, self._wer = log_every, Window(start=elapsed_seconds), math.nan
        self._plateau, self._shifted = PlateauNotice(), False
        self._live: Progress | None = None
        if self.console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self.console,
                refresh_per_second=2,
            )
            self._bar = self._live.add_task(stage, total=max_steps, text="")
            self._live.start()

    def on_step(self, record: StepRecord) -> None:
        self._window.add(record)
        if record.skipped_ids is not None:
            ids = ", ".join(record.skipped_ids[:3])
            text = f"{record.stage} step {record.step}: loss or gradient not finite, step left out ({ids} …)"
            self.console.print(text, highlight=False, markup=False)
        for whole in record.split_ids or ():
            text = f"{record.stage} step {record.step}: {len(whole)} clips did not fit into memory together"
            self.console.print(f"{text} and were run in halves; lower max_batch_tokens", highlight=False, markup=False)
        due = record.step % self._log_every == 0 or record.step == record.max_steps
        if not due and self._live is None:
            return
        if due:
            predictions = self._window.predictions
            row = self._window.flush(record)
            self._tell_shift(record, predictions)
            text = (
                f"loss {row['loss']:.3f}{self._wer_text()}  {row['audio_seconds_per_second']:.0f} audio-s/s  "
                f"{row['tokens_per_second']:.0f} tokens/s  {memory_bytes() / 1e9:.1f} GB"
            )
            if self._live is None:
                left = record.elapsed_seconds / record.step * (record.max_steps - record.step)
                place = f"{record.stage} {record.step}/{record.max_steps}"
                self.console.print(f"{place}  {text}  {_clock(left)} left", highlight=False, soft_wrap=True)
            else:
                self._live.update(self._bar, text=text)
        if self._live is not None:
            self._live.update(self._bar, completed=record.step)

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._wer = metrics.get("wer", math.nan)
        if self._live is None and not math.isnan(self._wer):
            self.console.print(f"{stage} {step}{self._wer_text()} on clips kept out of training", highlight=False)
        if notice := self._plateau.look(metrics):
            self.console.print(f"{stage} {step}  {notice}", highlight=False, markup=False, soft_wrap=True)

    def _tell_shift(self, record: StepRecord, predictions: PredictionCounts | None) -> None:
        """Once, when the labels look off by some places; not before a model has had time to learn where they are."""
        if predictions is None or self._shifted or record.step < SHIFT_STEPS:
            return
        if alarm := predictions.shift_alarm:
            self._shifted = True
            self.console.print(f"{record.stage} {record.step}  {alarm}", highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _wer_text(self) -> str:
        return "" if math.isnan(self._wer) else f"  WER so far {self._wer:.1%}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextmanager
def bar(
    title: str, unit: str = "s of audio", console: Console | None = None
) -> Iterator[Callable[[float, float], None]]:
    """A bar for one long job; yields what to call with the amount done and the amount in all."""
    console = console or Console(stderr=True, quiet=not is_main_process())
    if not console.is_terminal:
        announced = False

        def announce(done: float, total: float) -> None:
            nonlocal announced
            if not announced or done >= total:
                console.print(f"{title}: {done:.0f} of {total:.0f} {unit}", highlight=False, soft_wrap=True)
            announced = True

        yield announce
        return
    text = f"{{task.completed:.0f}} of {{task.total:.0f}} {unit}"
    columns = (SpinnerColumn(), TextColumn(f"[bold]{title}"), BarColumn(bar_width=20), TextColumn(text))
    with Progress(*columns, TimeRemainingColumn(compact=True), console=console) as live:
        task = live.add_task("", total=1)
        yield lambda done, total: live.update(task, completed=done, total=total)
