"""``samples/<stage>/samples-rank<r>.jsonl``: which example went into which step, for `ultravox data audit`.

One line per example, format version 1. A run that goes on after a kill may train some steps a second time: lines carry
the number of the attempt, and of one step the last attempt's count.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ultravox.training.trainer import StepRecord

FORMAT_VERSION = 1
FOLDER = "samples"


class SampleLog:
    """Appends the examples of each step."""

    def __init__(
        self, run_dir: Path, stage: str, source_names: Sequence[str], *, attempt: int = 0, rank: int = 0
    ) -> None:
        path = run_dir / FOLDER / stage / f"samples-rank{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._names, self._attempt, self._rank = source_names, attempt, rank
        self._file = path.open("a")

    def on_step(self, record: StepRecord) -> None:
        lines = []
        for loaded in record.batches:
            place = {
                "version": FORMAT_VERSION,
                "attempt": self._attempt,
                "step": record.step,
                "micro_batch": loaded.index,
                "rank": self._rank,
                "worker": loaded.worker,
                "epoch": loaded.batch.epoch,
            }
            for uid, source in zip(loaded.batch.uids, loaded.batch.sources, strict=True):
                lines.append(json.dumps({**place, "uid": uid, "source": self._names[source]}))
        self._file.write("".join(f"{line}\n" for line in lines))
        self._file.flush()

    def on_evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Evaluations train on nothing."""

    def close(self) -> None:
        self._file.close()


def next_attempt(run_dir: Path) -> int:
    """The number of a run's next attempt: one more than any in its logs."""
    attempts = [-1]
    for path in (run_dir / FOLDER).glob("*/samples-rank*.jsonl"):
        for line in _last_lines(path):
            try:
                attempts.append(json.loads(line)["attempt"])
            except (ValueError, KeyError):
                continue  # half a line, from a process that was killed
    return 1 + max(attempts)


def _last_lines(path: Path) -> list[bytes]:
    """The last whole line, and what may follow it, without reading the file."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().splitlines()[-2:]
