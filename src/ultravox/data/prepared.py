"""Reading a prepared dataset: a folder of Parquet shards that hold the audio itself, with an index and hashes.

Folder, format version 1, as `ultravox data prepare` writes it:

    prepared.json                       what is here: splits, shards with hashes, sources, licences, options
    index-<split>.parquet               a few numbers a row, in the rows' order: planning an epoch reads no audio
    data/<split>-00000-of-00008.parquet rows in the source's order, cut into consecutive shards
    quarantine.jsonl, same_audio.jsonl  what was left out and why; rows that hold the same recording

Hugging Face ``datasets`` reads the same folder: ``load_dataset(folder)``.
"""

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultravox.audio.content import NO_AUDIO
from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.data.clip import Clip
from ultravox.errors import AudioError, DataError
from ultravox.files import sha256_file

FORMAT_VERSION = 1
PREPARED_FILE = "prepared.json"
MAX_OPEN_FILES = 64  # by one thread
BATCH_ROWS = 4096  # rows without their audio that are read together

#: What a clip needs of a row, but for the encoded audio.
CLIP_COLUMNS = [
    "id",
    "audio.path",
    "num_samples",
    "text",
    "duration",
    "speaker",
    "licence",
    "language",
    "answer",
    "columns",
    "messages",
    "more_audio.list.element.path",
    "more_num_samples",
]


@dataclass(frozen=True, slots=True)
class ParquetAudio:
    """A recording in a cell of a shard. Small and picklable; each process and thread opens the shard for itself."""

    path: Path
    row_group: int
    row: int
    """In its row group."""
    place: int = 0
    """0 is the row's recording, n the n-th of its further ones."""
    suffix: str = ".flac"

    def read(self) -> bytes:
        """The encoded bytes. AudioError when the shard is gone or damaged."""
        column = "audio.bytes" if self.place == 0 else "more_audio.list.element.bytes"
        try:
            table = _open_shard(self.path).read_row_group(self.row_group, columns=[column], use_threads=False)
            cell = table.column(0)[self.row]
            content = (cell if self.place == 0 else cell[self.place - 1])["bytes"].as_py()
        except (OSError, pa.ArrowException, IndexError, TypeError) as error:
            raise AudioError(f"{self} cannot be read ({error}): run `ultravox data prepare --overwrite`") from error
        if content is None:
            raise AudioError(f"{self} holds no audio: run `ultravox data prepare --overwrite`")
        return bytes(content)

    def __str__(self) -> str:
        further = f", recording {self.place + 1}" if self.place else ""
        return f"{self.path}, row group {self.row_group}, row {self.row}{further}"


@dataclass(frozen=True, slots=True)
class PreparedIndex:
    """A few numbers for each row of a split, in the rows' order; every array is [row]."""

    id_hashes: np.ndarray
    """uint64, `hash_id` of the ids."""
    audio_hashes: np.ndarray
    """uint64, the beginning of the stored audio's SHA-256; 0 = no audio."""
    num_samples: np.ndarray
    """int32 at 16 kHz, exact; 0 = no audio."""
    more_num_samples: np.ndarray
    """int64, of the row's further recordings together."""
    num_tokens: np.ndarray
    """int32, of the text; -1 = not counted."""
    shards: np.ndarray
    """int32"""
    row_groups: np.ndarray
    """int32, in the shard."""
    rows: np.ndarray
    """int32, in the row group."""


def hash_id(id: str) -> int:
    """What the index calls a row: the first 64 bits of the id's SHA-256."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8], "little")


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds a prepared dataset, of whatever version."""
    return (Path(folder).expanduser() / PREPARED_FILE).is_file()


def read_prepared(folder: str | Path) -> dict[str, Any]:
    """The content of ``prepared.json``. DataError when it is not there, damaged, or of another version."""
    path = Path(folder).expanduser() / PREPARED_FILE
    try:
        info = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): expected a folder made by data prepare") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): run `ultravox data prepare --overwrite`") from error
    version = info.get("version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version!r}, this program reads {FORMAT_VERSION}: "
            "run `ultravox data prepare --overwrite`, or use the release that made it"
        )
    if not isinstance(info.get("splits"), dict):
        raise DataError(f"{path} names no splits: run `ultravox data prepare --overwrite`")
    return info


def prepared_splits(folder: str | Path) -> list[str]:
    """The splits of a prepared dataset."""
    return list(read_prepared(folder)["splits"])


def describe_prepared(folder: str | Path) -> dict[str, Any]:
    """Licence, attribution, fingerprint (of all content, by the shards' hashes), and rows and seconds of each split."""
    info = read_prepared(folder)
    splits = {
        name: {"num_clips": split["num_rows"], "seconds": split["seconds"]} for name, split in info["splits"].items()
    }
    return {**{key: info[key] for key in ("licence", "attribution", "fingerprint")}, "splits": splits}


def iter_prepared(folder: str | Path, split: str) -> Iterator[Clip]:
    """The clips of a split in their order, their audio in the shards. DataError names a missing or cut shard."""
    for path in shard_paths(folder, split):
        yield from shard_clips(path)


def shard_clips(path: Path) -> Iterator[Clip]:
    """The clips of one shard in their order. DataError when it cannot be read."""
    return (clip for _, _, clip in placed_clips(path))


def placed_clips(path: Path) -> Iterator[tuple[int, int, Clip]]:
    """`shard_clips`, each with its row group and its row in it."""
    try:
        shard = pq.ParquetFile(path, memory_map=True)
        with shard:
            groups = [shard.metadata.row_group(group).num_rows for group in range(shard.num_row_groups)]
            places = ((group, row) for group, count in enumerate(groups) for row in range(count))
            for batch in shard.iter_batches(BATCH_ROWS, columns=CLIP_COLUMNS, use_threads=False):
                for row in batch.to_pylist():
                    group, place = next(places)
                    yield group, place, _clip(row, path, group, place)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}): run `ultravox data prepare --overwrite`") from error


def read_group(path: Path, group: int) -> list[Clip]:
    """The clips of one row group of a shard, without their audio. DataError when it cannot be read."""
    try:
        rows = _open_shard(path).read_row_group(group, columns=CLIP_COLUMNS, use_threads=False).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}): run `ultravox data prepare --overwrite`") from error
    return [_clip(row, path, group, place) for place, row in enumerate(rows)]


def read_index(folder: str | Path, split: str) -> PreparedIndex:
    """The index of a split. No shard is opened; 10 million rows take about 0.4 GB of memory."""
    path = Path(folder).expanduser() / _split(folder, split)["index"]["file"]
    try:
        table = pq.read_table(path, memory_map=True)
        columns = {name: table.column(name).to_numpy() for name in PreparedIndex.__dataclass_fields__}
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read ({error}): run `ultravox data prepare --overwrite`") from error
    return PreparedIndex(**columns)


def verify(folder: str | Path) -> None:
    """Hash every file of a prepared dataset. DataError names the first one that is not as it was written."""
    folder = Path(folder).expanduser()
    info = read_prepared(folder)
    if info.get("fingerprint") != fingerprint_of(info):
        raise DataError(
            f"{folder / PREPARED_FILE} was changed after it was written: run `ultravox data prepare --overwrite`"
        )
    for entry in _files(info):
        path = folder / entry["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing: run `ultravox data prepare --overwrite`, or copy the folder again")
        if sha256_file(path) != entry["sha256"]:
            raise DataError(
                f"{path} is damaged (its SHA-256 differs from the one in {PREPARED_FILE}): copy it again, or run "
                "`ultravox data prepare` again"
            )


def fingerprint_of(info: Mapping[str, Any]) -> str:
    """Hex SHA-256 of all that ``prepared.json`` says, which holds the hashes of all files."""
    content = {key: value for key, value in info.items() if key != "fingerprint"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(info: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for split in info["splits"].values():
        yield from split["shards"]
        yield split["index"]
    yield info["quarantine"]
    yield info["same_audio"]


def _split(folder: str | Path, split: str) -> dict[str, Any]:
    splits = read_prepared(folder)["splits"]
    if split not in splits:
        raise DataError(f"prepared dataset {folder} has no split {split!r}: it has {', '.join(splits) or 'none'}")
    return splits[split]


def shard_paths(folder: str | Path, split: str) -> Iterator[Path]:
    """The shards of a split, in order. DataError names a missing or cut one, or says which splits there are."""
    root = Path(folder).expanduser().absolute()
    for entry in _split(folder, split)["shards"]:
        path = root / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["num_bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path} {found}, expected {entry['num_bytes']} bytes: copy the folder again")
        yield path


def _clip(row: Mapping[str, Any], path: Path, row_group: int, place: int) -> Clip:
    def audio(index: int, cell: Mapping[str, Any]) -> ParquetAudio:
        return ParquetAudio(path, row_group, place, index, os.path.splitext(cell["path"])[1])

    more = zip(row["more_audio"] or (), row["more_num_samples"] or (), strict=True)
    return Clip(
        id=row["id"],
        audio=NO_AUDIO if row["audio"] is None else audio(0, row["audio"]),
        text=row["text"],
        duration=row["duration"],
        speaker=row["speaker"],
        licence=row["licence"],
        answer=row["answer"],
        language=row["language"],
        columns=json.loads(row["columns"]) if row["columns"] else {},
        more_audio=tuple((audio(index, cell), num / SAMPLE_RATE) for index, (cell, num) in enumerate(more, start=1)),
        messages=None if row["messages"] is None else tuple(row["messages"]),
    )


class _OpenFiles(threading.local):
    """The shards that this thread has open, the least recently used one first. No lock, so that a fork holds none."""

    def __init__(self) -> None:
        self.files: OrderedDict[tuple[Path, int, int, int], pq.ParquetFile] = OrderedDict()


_open_files = _OpenFiles()


def _open_shard(path: Path) -> pq.ParquetFile:
    """The open shard; a file that has taken its place since is opened anew."""
    status = os.stat(path)
    key = (path, status.st_ino, status.st_size, status.st_mtime_ns)
    files = _open_files.files
    if key not in files:
        files[key] = pq.ParquetFile(path, memory_map=True)
        while len(files) > MAX_OPEN_FILES:
            files.popitem(last=False)
    files.move_to_end(key)
    return files[key]
