"""Any source to a prepared dataset: every row checked, its audio at 16 kHz in Parquet shards, an index, hashes.

The rows are read twice. The first pass counts and cuts (`sharding`), the second hands out the shards (`engines`), each
of which is built on its own (`shard`); `publish` ends it. Rows keep their order: shard after shard holds consecutive
rows. The result does not depend on who builds what.

The work lies in ``<output>.partial`` until it is whole. After a crash, the same command goes on there: a finished shard
that was built of the same rows is kept.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ultravox.data.engines import ENGINES
from ultravox.data.prepared import FORMAT_VERSION, is_prepared, read_prepared, verify
from ultravox.data.publish import QUARANTINE_FILE, describe, publish, write_quarantine
from ultravox.data.quarantine import Quarantine
from ultravox.data.shard import LeftOut, ShardReport, ShardTask, made_with
from ultravox.data.sharding import CountTokens, PrepareOptions, Rows, SplitPlan, make_tasks, plan_split
from ultravox.errors import DataError
from ultravox.files import make_folder

SHARE_OPTION = "--max-quarantine-share"
SPLIT_NAME = re.compile(r"\w+(\.\w+)*")  # what Hugging Face `datasets` takes


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came out."""

    info: Mapping[str, Any]
    """The content of ``prepared.json``."""
    num_built: int
    """Shards that this run built; the others were there."""


def prepare_dataset(
    output: str | Path,
    splits: Mapping[str, Rows],
    options: PrepareOptions,
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    count_tokens: CountTokens | None = None,
    engine: str = "local",
    workers: int = 1,
    max_quarantine_share: float = 0.01,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Prepare the rows of some splits into a folder of its own.

    Args:
        output: the folder to make. One that holds the same already is left as it is.
        splits: name of each split → its rows.
        sources: what is known of where they come from: name, licence, attribution, and what else is to be kept.
        count_tokens: runs in this process.
        engine, workers: who does the work ("local", "ray"). They change nothing in the result.
        max_quarantine_share: more faulty rows than this share stop the run.
        overwrite: replace a prepared dataset of that name, whatever it holds.
        on_progress: called with the rows done and in all.

    Raises:
        DataError: no rows, too many faulty rows, another dataset in the place, a second run at once, a killed worker.
    """
    output = Path(output).expanduser().absolute()
    _check(output, splits)
    with _work_folder(output) as partial:
        plans = [plan_split(name, rows, options) for name, rows in splits.items()]
        about = _about(plans, options, sources)
        if is_prepared(output) and not overwrite:
            if (info := read_prepared(output)).get("input") != about["input"]:
                raise DataError(f"{output} holds another prepared dataset: choose another folder, or give --overwrite")
            verify(output)
            _judge(output, info, max_quarantine_share)
            return Prepared(info, 0)
        progress = _Progress(partial, plans, max_quarantine_share, on_progress)
        context = json.dumps([FORMAT_VERSION, about["made_with"], about["sources"]])
        tasks = (task for plan in plans for task in make_tasks(plan, partial, options, context, count_tokens))
        reports: dict[str, list[ShardReport]] = {}
        with closing(ENGINES[engine](progress.watch(tasks), workers)) as built:
            for plan in plans:
                reports[plan.name] = [progress.add(report) for report in islice(built, plan.num_shards)]
                if not any(report.num_rows for report in reports[plan.name]):
                    progress.fail(f"no row of split {plan.name!r} can be used")
        info = describe(partial, reports, progress.left_out, about)
        publish(partial, output, info)
    return Prepared(info, progress.num_built)


def _judge(folder: Path, info: Mapping[str, Any], max_share: float) -> None:
    """DataError when a dataset that is there was prepared with more faulty rows than are wanted now."""
    quarantine = Quarantine()
    for line in (folder / info["quarantine"]["file"]).read_text(encoding="utf-8").splitlines():
        row = LeftOut(**json.loads(line))
        quarantine.add(row.reason, _name_of(row))
    quarantine.require(max_share, sum(split["num_read"] for split in info["rows"].values()), SHARE_OPTION)


def _name_of(row: LeftOut) -> str:
    return f"{row.split}/{row.id}: {row.detail}"


class _Progress:
    """Counts what is done and what is left out, and stops when that is too much."""

    def __init__(
        self,
        partial: Path,
        plans: Sequence[SplitPlan],
        max_share: float,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.partial, self.max_share, self.on_progress = partial, max_share, on_progress
        self.quarantine = Quarantine()
        self.left_out: list[LeftOut] = []
        self.total = sum(plan.num_rows for plan in plans)
        self.num_done = self.num_built = 0
        self._show()

    def watch(self, tasks: Iterator[ShardTask | ShardReport]) -> Iterator[ShardTask | ShardReport]:
        """The same tasks, those that are still to be built counted."""
        for task in tasks:
            self.num_built += isinstance(task, ShardTask)
            yield task

    def add(self, report: ShardReport) -> ShardReport:
        """Count a shard. DataError when too many rows are faulty."""
        for row in report.left_out:
            self.quarantine.add(row.reason, _name_of(row))
        self.left_out += report.left_out
        self.num_done += report.num_rows + len(report.left_out)
        try:
            self.quarantine.require(self.max_share, self.total, SHARE_OPTION)
        except DataError as error:
            self.fail(str(error))
        self._show()
        return report

    def fail(self, message: str) -> None:
        """Leave the list of what is wrong where it can be looked at, and raise a DataError that says where."""
        write_quarantine(self.partial, self.left_out)
        raise DataError(f"{message}; every row that was left out is named in {self.partial / QUARANTINE_FILE}")

    def _show(self) -> None:
        if self.on_progress:
            self.on_progress(self.num_done, self.total)


def _about(plans: Sequence[SplitPlan], options: PrepareOptions, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first part of ``prepared.json``, with a hash of all that decides the result but the audio itself."""

    def each(key: str) -> list[str]:
        return list(dict.fromkeys(str(source[key]) for source in sources if source.get(key)))

    about: dict[str, Any] = {
        "licence": ", ".join(each("licence")),
        "attribution": " ".join(each("attribution")),
        "sources": [dict(source) for source in sources],
        "options": asdict(options),
        "made_with": made_with(),
        "rows": {plan.name: {"num_read": plan.num_rows, "sha256": plan.fingerprint} for plan in plans},
    }
    return {**about, "input": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def _check(output: Path, splits: Mapping[str, Rows]) -> None:
    for name in splits:
        if not SPLIT_NAME.fullmatch(name):
            raise DataError(f"a split may be named by letters, digits and _ alone, got {name!r}: rename it")
    if output.exists() and not is_prepared(output) and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(f"{output} is there already and is no prepared dataset: choose another folder")


@contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """``<output>.partial``, for this process alone; removed in the end unless a finished shard in it is worth keeping.

    DataError when another process works on it.
    """
    partial = output.with_name(f"{output.name}.partial")
    for name in ("data", "work"):
        make_folder(partial / name)
    lock = partial / "work" / "lock"
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except OSError:
            mine = False
        if not mine:
            raise DataError(f"another process prepares {output} at this moment: wait until it is done")
        for half in (partial / "data").glob(".*"):  # of a run that was killed
            half.unlink(missing_ok=True)
        try:
            yield partial
        finally:
            if partial.exists() and not any(partial.glob("work/*.json")):
                shutil.rmtree(partial)
