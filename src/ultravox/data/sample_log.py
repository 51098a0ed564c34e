"""Which examples a run trained on: a line for each micro-batch, in one file for each rank; and reading them as columns.

    {"format": 1, "attempt": 0, "rank": 1, "world_size": 2, "first_step": 0}
    {"attempt": 0, "step": 0, "micro_batch": 1, "worker": 0, "epoch": 0, "uids": ["9f…", …], "sources": ["en", …]}

Of streams, a line also has the `window` that its batch is of, and `epochs`: of each example, the epoch of its stream.

Each start of a run is an attempt, which begins with a line of the first form. An attempt that goes on from a checkpoint
repeats the steps after it, so its steps take the place of those that earlier attempts made from `first_step` on.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ultravox.errors import DataError

FORMAT = 1
_HEAD = b'{"format"'
_BLOCK = 64 << 20  # bytes that are read together; no line is longer


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank writes."""
    return folder / f"samples-rank{rank}.jsonl"


def next_attempt(folder: Path) -> int:
    """The number of the attempt that is about to start: one more than the last in any rank's log."""
    numbers = [-1]
    for path in folder.glob("samples-rank*.jsonl"):
        with path.open("rb") as file:
            numbers += [json.loads(line)["attempt"] for line in file if line.startswith(_HEAD) and line.endswith(b"\n")]
    return max(numbers) + 1


class SampleLog:
    """Writes one rank's lines, each at once, so that nothing is lost when the process is killed."""

    def __init__(self, folder: Path, *, rank: int, world_size: int, attempt: int, first_step: int) -> None:
        """Args:
        folder: of the run; the file is appended to.
        rank, world_size: of this process.
        attempt: see `next_attempt`; the same on all ranks.
        first_step: the first step that this attempt makes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = log_path(folder, rank)
        self._attempt = attempt
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _cut_torn_line(self._file)
        self._append(
            {"format": FORMAT, "attempt": attempt, "rank": rank, "world_size": world_size, "first_step": first_step}
        )

    def write(
        self,
        *,
        step: int,
        micro_batch: int,
        worker: int,
        epoch: int,
        uids: Sequence[str],
        sources: Sequence[str],
        epochs: Sequence[int] | None = None,
        window: int | None = None,
    ) -> None:
        """One micro-batch: its number within the step over all ranks, and its examples in their order."""
        if len(uids) != len(sources) or (epochs is not None and len(epochs) != len(uids)):
            raise ValueError(f"{len(uids)} uids, {len(sources)} sources, epochs {epochs}")
        line = {"attempt": self._attempt, "step": step, "micro_batch": micro_batch, "worker": worker, "epoch": epoch}
        streamed = {} if epochs is None else {"window": window, "epochs": list(epochs)}
        self._append(line | streamed | {"uids": list(uids), "sources": list(sources)})

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        while data:
            data = data[os.write(self._file, data) :]

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "SampleLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _cut_torn_line(file: int) -> None:
    """Cut off what a killed process left of its last line, and stand at the end."""
    end = os.lseek(file, 0, os.SEEK_END)
    whole = end
    while whole:
        begin = max(0, whole - (1 << 20))
        found = os.pread(file, whole - begin, begin).rfind(b"\n")
        whole = begin + found + 1
        if found >= 0:
            break
    if whole < end:
        os.ftruncate(file, whole)
        os.lseek(file, whole, os.SEEK_SET)


@dataclass(frozen=True, slots=True)
class Records:
    """Examples as they were trained on; all arrays are [record]."""

    attempt: np.ndarray
    step: np.ndarray
    micro_batch: np.ndarray
    """Within the step, over all ranks."""
    place: np.ndarray
    """Within the micro-batch."""
    rank: np.ndarray
    worker: np.ndarray
    epoch: np.ndarray
    uid: np.ndarray
    """uint64."""
    source: np.ndarray
    """Index into `source_names`."""
    window: np.ndarray
    """Of a stream; -1 where the order is no stream's."""
    source_names: list[str]
    first_steps: dict[int, int]
    """Of each attempt."""
    num_superseded: int = 0
    """Records that a later attempt took the place of; they are not among these."""

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, chosen: np.ndarray) -> "Records":
        """Some of the records: a mask or indices."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: array[chosen] for name, array in columns.items() if isinstance(array, np.ndarray)}
        return replace(self, **arrays)

    def without_superseded(self) -> "Records":
        """Only what counts: of each step, the records of the last attempt that made it."""
        limits, lowest = {}, np.iinfo(np.int64).max
        for attempt in sorted(self.first_steps, reverse=True):
            limits[attempt] = lowest
            lowest = min(lowest, self.first_steps[attempt])
        table = np.array([limits.get(attempt, 0) for attempt in range(max(limits, default=0) + 1)])
        kept = self.step < table[self.attempt]
        found = self if kept.all() else self.take(kept)
        return replace(found, num_superseded=self.num_superseded + int(len(kept) - kept.sum()))

    def in_order(self) -> "Records":
        """In the global order: by step, micro-batch and place."""
        key = self.step.astype(np.int64) * (int(self.micro_batch.max(initial=0)) + 1) + self.micro_batch
        key = key * (int(self.place.max(initial=0)) + 1) + self.place
        return self.take(np.argsort(key, kind="stable"))


def parse_uids(texts: Any) -> np.ndarray:
    """Names of 16 hex digits, a list or a string column of pyarrow, as uint64, [name].

    Raises:
        DataError: one is no such name.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    if not len(column):
        return np.zeros(0, dtype=np.uint64)
    if column.null_count or pc.min_max(pc.binary_length(column)).as_py() != {"min": 16, "max": 16}:
        raise DataError("a uid in the sample log does not have 16 hex digits")
    first = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset]
    digits = np.frombuffer(column.buffers()[2], dtype=np.uint8, count=16 * len(column), offset=int(first))
    values = np.full(256, 255, dtype=np.uint8)
    values[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)
    nibbles = values[digits].reshape(-1, 2)
    if nibbles.max() > 15:
        raise DataError("a uid in the sample log does not have 16 hex digits")
    return (nibbles[:, 0] << 4 | nibbles[:, 1]).view(">u8").astype(np.uint64)


def read_sample_logs(folder: Path) -> Records:
    """The records of all ranks, of all attempts. A last line that a killed process left unfinished is no record.

    Raises:
        DataError: there are none, or one is of another format or damaged.
    """
    paths = sorted(folder.glob("samples-rank*.jsonl"))
    if not paths:
        raise DataError(f"{folder} holds no samples-rank<r>.jsonl: was the run made with a log of its samples?")
    parts: list[dict[str, np.ndarray]] = []
    first_steps: dict[int, int] = {}
    names: dict[str, int] = {}
    for path in paths:
        parts += _read_file(path, first_steps, names)
    columns: dict[str, Any] = {
        key: np.concatenate([part[key] for part in parts]) for key in (parts[0] if parts else [])
    }
    if not columns:
        raise DataError(f"{folder}: the sample logs hold no micro-batch")
    return Records(**columns, source_names=list(names), first_steps=first_steps)


def _read_file(path: Path, first_steps: dict[int, int], names: dict[str, int]) -> list[dict[str, np.ndarray]]:
    """Columns of one rank's file, block by block; adds to the attempts' first steps and the sources' names."""
    import pyarrow as pa
    import pyarrow.json

    with path.open("rb") as file:
        head = file.readline()
    try:
        version = json.loads(head).get("format") if head.startswith(_HEAD) else None
    except ValueError:
        version = None
    if version != FORMAT:
        raise DataError(f"{path} begins with format {version}, expected {FORMAT}: it is of another version, or no log")
    numbers = dict.fromkeys(
        "format attempt rank world_size first_step step micro_batch worker epoch window".split(), pa.int64()
    )
    lists = dict.fromkeys(("uids", "sources"), pa.list_(pa.string())) | {"epochs": pa.list_(pa.int64())}
    parse = pyarrow.json.ParseOptions(
        explicit_schema=pa.schema(list({**numbers, **lists}.items())), unexpected_field_behavior="error"
    )
    with pa.memory_map(str(path)) as source:
        size = _whole_lines(source)
        data = pa.py_buffer(memoryview(source.read_buffer(size)))
        read = pyarrow.json.ReadOptions(block_size=min(_BLOCK, max(size, 1)), use_threads=True)
        try:
            table = pyarrow.json.read_json(pa.BufferReader(data), read, parse)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
    return [_columns(path, batch, first_steps, names) for batch in table.to_batches()]


def _whole_lines(source: Any) -> int:
    """Bytes up to the end of the last whole line."""
    end = source.size()
    while end:
        begin = max(0, end - (1 << 20))
        source.seek(begin)
        found = source.read(end - begin).rfind(b"\n")
        if found >= 0:
            source.seek(0)
            return begin + found + 1
        end = begin
    return 0


def _columns(path: Path, batch: Any, first_steps: dict[int, int], names: dict[str, int]) -> dict[str, np.ndarray]:
    """Columns [record] of a block of lines."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_head = np.asarray(pc.is_valid(batch["format"]).to_numpy(zero_copy_only=False))
    for head in batch.filter(pa.array(is_head)).to_pylist():
        if head["format"] != FORMAT:
            raise DataError(f"{path} has a part of format {head['format']}, expected {FORMAT}")
        attempt = head["attempt"]
        first_steps[attempt] = min(head["first_step"], first_steps.get(attempt, head["first_step"]))
    lines = batch.filter(pa.array(~is_head))
    columns = {}
    counts = pc.fill_null(pc.list_value_length(lines["uids"]), -1).to_numpy()
    if not np.array_equal(counts, pc.fill_null(pc.list_value_length(lines["sources"]), -2).to_numpy()):
        raise DataError(f"{path} is damaged: a line has not as many sources as uids")
    for name in ("attempt", "step", "micro_batch", "worker", "epoch"):
        if lines[name].null_count:
            raise DataError(f"{path} is damaged: a line has no {name}")
        columns[name] = np.repeat(lines[name].to_numpy().astype(np.int32), counts)
    columns["window"] = np.repeat(pc.fill_null(lines["window"], -1).to_numpy().astype(np.int32), counts)
    own = pc.is_valid(lines["epochs"])
    if not np.array_equal(pc.list_value_length(lines["epochs"].filter(own)).to_numpy(), counts[np.asarray(own)]):
        raise DataError(f"{path} is damaged: a line has not as many epochs as uids")
    columns["epoch"][np.repeat(np.asarray(own), counts)] = lines["epochs"].flatten().to_numpy()
    if unknown := sorted(set(np.unique(columns["attempt"]).tolist()) - set(first_steps)):
        raise DataError(f"{path} is damaged: attempt {unknown[0]} has no first line")
    found = lines["sources"].flatten().dictionary_encode()
    if found.null_count:
        raise DataError(f"{path} is damaged: an example has no source")
    codes = np.array([names.setdefault(name, len(names)) for name in found.dictionary.to_pylist()], dtype=np.int32)
    columns["source"] = codes[found.indices.to_numpy()] if len(found) else np.zeros(0, dtype=np.int32)
    columns["uid"] = parse_uids(lines["uids"].flatten())
    columns["place"] = (np.arange(len(columns["uid"])) - np.repeat(counts.cumsum() - counts, counts)).astype(np.int32)
    columns["rank"] = np.full(len(columns["uid"]), int(path.stem.removeprefix("samples-rank")), dtype=np.int32)
    return columns
