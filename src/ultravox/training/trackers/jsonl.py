"""``log.jsonl``: one JSON object per line, format version 1."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultravox.files import atomic_write
from ultravox.training.measure import memory_in_use
from ultravox.training.trackers.window import Window
from ultravox.training.trainer import StepRecord

FORMAT_VERSION = 1


class JsonLinesLog:
    """Appends a row every `log_every` steps, for each evaluation, and for each step left out or with a spike.

    `elapsed_seconds` is how long the stage had trained before it was resumed: rates are of the time after that.
    """

    def __init__(self, path: Path, log_every: int, elapsed_seconds: float = 0.0, num_decimals: int = 8) -> None:
        self.path, self.log_every, self._decimals = path, log_every, num_decimals
        self._window, self._elapsed = Window(start=elapsed_seconds), elapsed_seconds
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def on_step(self, record: StepRecord) -> None:
        self._window.add(record)
        self._elapsed = record.elapsed_seconds
        if record.skipped_ids is not None:
            self._write(record.stage, record.step, {"skipped_ids": record.skipped_ids})
        if record.split_ids is not None:
            self._write(record.stage, record.step, {"split_ids": record.split_ids})
        if record.spike_ids is not None:
            self._write(record.stage, record.step, {"spike_loss": record.loss, "spike_ids": record.spike_ids})
        if record.step % self.log_every == 0 or record.step == record.max_steps:
            row = self._window.flush(record)
            lr = record.lr.get("projector", max(record.lr.values(), default=0.0))
            rates = {f"lr_{part}": rate for part, rate in record.lr.items()}
            extra = {"lr": lr, **rates, "grad_norm": record.grad_norm, "elapsed_seconds": record.elapsed_seconds}
            self._write(record.stage, record.step, {**row, **extra, **record.of_parts, **memory_in_use()})

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._write(stage, step, {**metrics, "elapsed_seconds": self._elapsed})

    def close(self) -> None:
        self._file.close()

    def _write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        row: dict[str, Any] = {"version": FORMAT_VERSION, "stage": stage, "step": step}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = (round(value, self._decimals) if isinstance(value, float) else value) if finite else None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def drop_rows_after(path: Path, stages: Sequence[str], stage: str | None = None, step: int = 0) -> None:
    """Before going on from a step of a stage, forget what was logged later: each step is in the log once."""
    if not path.is_file():
        return
    limit = (stages.index(stage), step) if stage is not None else (-1, 0)
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
            if (stages.index(row["stage"]), row["step"]) <= limit:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # half a line, from a process that was killed
    atomic_write(path, "".join(f"{line}\n" for line in kept))
