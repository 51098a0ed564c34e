"""A run's ``log.jsonl`` as lines to draw: loss and word error rate over elapsed minutes, all stages on one axis."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ultravox.errors import DataError
from ultravox.evaluation.figures import Series

MAX_POINTS = 300  # for each line: more than a screen shows


@dataclass(slots=True)
class Curves:
    """Lines by stage, and the bands (name, first minute, last minute) of the stages."""

    loss: list[Series] = field(default_factory=list)
    wer: list[Series] = field(default_factory=list)
    stages: list[tuple[str, float, float]] = field(default_factory=list)


def _rows(path: Path) -> list[dict]:
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # a run that was killed leaves half a last line; it is no measurement
            raise DataError(
                f"{path}, line {number}: not a JSON object ({error}); move the log away to go on"
            ) from error
        if isinstance(row, dict) and isinstance(row.get("stage"), str):
            rows.append(row)
    return rows


def _number(row: dict, key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _thin(series: Series) -> Series:
    """At most MAX_POINTS points: the mean of each run of neighbours."""
    size = math.ceil(len(series.x) / MAX_POINTS)
    if size <= 1:
        return series
    starts = range(0, len(series.x), size)
    x = [sum(part) / len(part) for part in (series.x[s : s + size] for s in starts)]
    y = [sum(part) / len(part) for part in (series.y[s : s + size] for s in starts)]
    return Series(series.name, x, y)


def read_curves(path: Path) -> Curves:
    """Curves of a log; empty ones when there is no log, DataError when a line of it is broken.

    ``elapsed_seconds`` counts from the beginning of its stage; rows without it (evaluations) belong to the row before.
    """
    curves = Curves()
    if not path.is_file():
        return curves
    begin = last = 0.0  # of the stage, in seconds of the run
    lines: dict[str, dict[str, Series]] = {"loss": {}, "wer": {}}
    for row in _rows(path):
        stage, seconds = row["stage"], _number(row, "elapsed_seconds")
        if not curves.stages or curves.stages[-1][0] != stage:
            begin = last
            curves.stages.append((stage, begin / 60, begin / 60))
        last = max(last, begin + (seconds or 0.0))
        minutes = last / 60
        curves.stages[-1] = (stage, curves.stages[-1][1], minutes)
        for key, by_stage in lines.items():
            value = _number(row, key)
            if value is not None and (key == "wer" or value > 0):  # a log axis has no zero
                series = by_stage.setdefault(stage, Series(stage, [], []))
                series.x.append(minutes)
                series.y.append(value)
    curves.loss = [_thin(series) for series in lines["loss"].values()]
    curves.wer = list(lines["wer"].values())
    return curves
