"""``log.jsonl``: one JSON object per line, format version 1."""

import json
import math
from pathlib import Path
from typing import Any

from ultravox.training.measure import memory_bytes
from ultravox.training.trackers.window import Window
from ultravox.training.trainer import StepRecord

FORMAT_VERSION = 1


class JsonLinesLog:
    """Appends a row every `log_every` steps, for each evaluation, and for each step that was not taken.

    On resuming, rows after the step gone back to are dropped: each step is in the log once.
    """

    def __init__(self, path: Path, log_every: int, stage: str, resume_step: int = 0, num_decimals: int = 8) -> None:
        self.path, self.log_every, self._decimals = path, log_every, num_decimals
        self._window: Window | None = None
        self._resume_step = resume_step
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if not _is_later(line, stage, resume_step)]
            path.write_text("".join(f"{row}\n" for row in rows))
        self._file = path.open("a")

    def on_step(self, record: StepRecord) -> None:
        if self._window is None:
            self._window = Window()
            # Rates are of this process; the time before it was resumed is in elapsed_seconds.
            if self._resume_step:
                self._window.start = record.elapsed_seconds
        self._window.add(record)
        if record.skipped_ids is not None:
            self._write(record.stage, record.step, {"skipped_ids": record.skipped_ids})
        if record.step % self.log_every == 0 or record.step == record.max_steps:
            row = self._window.flush(record)
            lr = record.lr.get("projector", max(record.lr.values(), default=0.0))
            rates = {f"lr_{part}": rate for part, rate in record.lr.items()}
            extra = {"lr": lr, **rates, "grad_norm": record.grad_norm, "elapsed_seconds": record.elapsed_seconds}
            self._write(record.stage, record.step, {**row, **extra, "memory_bytes": memory_bytes()})

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._write(stage, step, metrics)

    def close(self) -> None:
        self._file.close()

    def _write(self, stage: str, step: int, values: dict[str, Any]) -> None:
        row: dict[str, Any] = {"version": FORMAT_VERSION, "stage": stage, "step": step}
        for name, value in values.items():
            finite = not isinstance(value, float) or math.isfinite(value)
            row[name] = (round(value, self._decimals) if isinstance(value, float) else value) if finite else None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def _is_later(line: str, stage: str, step: int) -> bool:
    try:
        row = json.loads(line)
        return row["stage"] == stage and row["step"] > step
    except (ValueError, KeyError, TypeError):
        return True  # half a line, from a process that was killed
