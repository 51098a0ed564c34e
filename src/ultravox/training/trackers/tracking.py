"""The trackers of a run: they are started or continued, told what happens, and none of them can end the run later."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from ultravox.auth.secret import Secret, redact
from ultravox.errors import CheckpointError, UltravoxError
from ultravox.files import atomic_write
from ultravox.training.interrupt import TrainingInterrupted
from ultravox.training.task import Transcript
from ultravox.training.trackers.tracker import Outcome, Tracker
from ultravox.training.trackers.window import Window, row_of
from ultravox.training.trainer import StepRecord

FORMAT_VERSION = 1
FILE = "trackers.json"
#: A tracker that has failed is left alone for so long, so that one which no longer answers costs little time.
PAUSE_SECONDS = 60.0


class _Guarded:
    """A tracker that has started. What it raises is told once and counted."""

    def __init__(self, tracker: Tracker, secrets: Sequence[Secret], console: Console) -> None:
        self.tracker, self._secrets, self._console = tracker, secrets, console
        self.num_lost, self._is_told, self._silent_until = 0, False, -math.inf

    def call(self, action: Callable[[Tracker], None]) -> None:
        if time.monotonic() < self._silent_until:
            self.num_lost += 1
            return
        try:
            action(self.tracker)
        except Exception as error:
            self.num_lost += 1
            self._silent_until = time.monotonic() + PAUSE_SECONDS
            if not self._is_told:
                self._is_told = True
                self._say(f"{_words(error, self._secrets)}; training goes on, and log.jsonl has all numbers")

    def finish(self, outcome: Outcome) -> None:
        try:
            with self.tracker.stack:
                self.tracker.finish(outcome)
        except Exception as error:
            self._say(f"could not finish: {_words(error, self._secrets)}")
        if self.num_lost:
            self._say(f"{self.num_lost} of the messages to it were lost")

    def _say(self, text: str) -> None:
        self._console.print(f"{self.tracker.name}: {text}", highlight=False, markup=False, soft_wrap=True)


class StageTracking:
    """Tells trackers what the loop does in one stage."""

    def __init__(
        self,
        trackers: Sequence[_Guarded],
        log_every: int,
        *,
        first_step: int = 0,
        elapsed_seconds: float = 0.0,
        num_transcripts: int = 0,
    ) -> None:
        """Args:
        trackers: that have started.
        log_every: steps between two rows.
        first_step: steps of the stages before this one.
        elapsed_seconds: how long the stage had trained before it was resumed.
        num_transcripts: clips that are shown at an evaluation.
        """
        self._trackers, self._log_every, self._first_step = trackers, log_every, first_step
        self._window, self._num_transcripts = Window(start=elapsed_seconds), num_transcripts

    def on_step(self, record: StepRecord) -> None:
        self._window.add(record)
        if record.step % self._log_every == 0 or record.step == record.max_steps:
            self._log(record.stage, record.step, row_of(self._window, record))

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._log(stage, step, metrics)

    def on_transcripts(self, stage: str, step: int, transcripts: Sequence[Transcript]) -> None:
        if shown := transcripts[: self._num_transcripts]:
            for tracker in self._trackers:
                tracker.call(lambda one: one.log_transcripts(stage, shown, self._first_step + step))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """After a checkpoint was saved, and before an older one is removed."""
        for tracker in self._trackers:
            tracker.call(lambda one: one.log_checkpoint(folder, self._first_step + step))

    def _log(self, stage: str, step: int, row: Mapping[str, float]) -> None:
        values = {f"{stage}/{name}": float(value) for name, value in row.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.call(lambda one: one.log(values, self._first_step + step))


class RunTracking:
    """All trackers of a run, from its beginning to its end; a context manager."""

    def __init__(
        self,
        trackers: Sequence[Tracker],
        run_dir: Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        secrets: Sequence[Secret] = (),
        console: Console | None = None,
    ) -> None:
        """Args:
        trackers: that have not started.
        run_dir: of the run; `trackers.json` there keeps the ids of its runs at the trackers.
        config: resolved, as JSON.
        resume: go on with these.
        secrets: that must not be told, whatever an error says.
        """
        self._trackers, self._path, self._secrets = trackers, run_dir / FILE, secrets
        self._config = json.loads(redact(json.dumps(config), secrets))
        self._runs: dict[str, Any] = _read(self._path) if resume else {}
        self._console = console or Console(stderr=True)
        self.started: list[_Guarded] = []

    def __enter__(self) -> "RunTracking":
        try:
            for tracker in self._trackers:
                self._start(tracker)
        except BaseException:
            self._finish("failed")
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stopped = isinstance(error, TrainingInterrupted | KeyboardInterrupt)
        self._finish("finished" if error is None else "stopped" if stopped else "failed")

    def _start(self, tracker: Tracker) -> None:
        place = {"project": tracker.options.project, "offline": tracker.options.offline}
        known = self._runs.get(tracker.name, {"ids": []})
        ids = known["ids"] if {key: known.get(key) for key in place} == place else []
        try:
            run_id = tracker.start(ids[-1] if ids else None, self._config)
        except Exception as error:
            tracker.stack.close()
            raise UltravoxError(
                f"{tracker.name} could not start: {_words(error, self._secrets)}; mend that, drop it from "
                "logging.trackers, or log offline with --logging.offline true"
            ) from error
        self.started.append(_Guarded(tracker, self._secrets, self._console))
        if ids and run_id not in ids:
            text = f"{tracker.name}: run {ids[-1]} cannot be gone on with; a new one began, {run_id}"
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._runs[tracker.name] = {**place, "ids": ids if run_id in ids else [*ids, run_id]}
        atomic_write(self._path, json.dumps({"version": FORMAT_VERSION, "runs": self._runs}, indent=2) + "\n")

    def _finish(self, outcome: Outcome) -> None:
        while self.started:
            self.started.pop().finish(outcome)


def _words(error: Exception, secrets: Sequence[Secret]) -> str:
    """An error of a library in one line, without what must not be told."""
    text = " ".join(redact(str(error), secrets).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _read(path: Path) -> dict[str, Any]:
    """Tracker → its project and the ids of its runs, as they were."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        version, runs = content["version"], dict(content["runs"])
        whole = all(runs[name]["ids"] and {"project", "offline"} <= runs[name].keys() for name in runs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: remove it to begin new runs at the trackers") from error
    if version != FORMAT_VERSION or not whole:
        raise CheckpointError(
            f"{path} has format version {version}, this UltraVox reads {FORMAT_VERSION}: remove it to begin new runs "
            "at the trackers"
        )
    return runs
