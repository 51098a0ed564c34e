"""Clips and the folders they lie in: ``dataset.json``, one JSON-lines file per split, and ``audio/``.

A row is ``{"id", "audio", "text", "duration", "speaker", "licence", "language", "answer"}``; ``audio`` is relative to
the folder of the file, ``duration`` is in seconds, ``answer`` (optional) is what the language model itself answers to
the text. A row of a conversation has a list of files in ``audio``, and ``messages`` with a placeholder for each.
"""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ultravox.data.clip import Clip, RowFault, RowReader, file_below
from ultravox.data.columns import Columns
from ultravox.errors import DataError
from ultravox.files import atomic_write, sha256_file, ultravox_home

__all__ = ["Clip", "dataset_folder", "is_whole", "read_dataset", "read_rows", "split_file", "write_dataset"]

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MANIFEST_SUFFIXES = (".jsonl", ".json")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".mp4")
MOST_NAMED = 3
BUNDLED_DATASETS = ("asterisk-en", "synthetic-en", "spoken-requests-en")


def dataset_folder(source: str | Path) -> Path:
    """The folder of a bundled dataset's name, or of a path to a dataset folder. DataError when it is not there."""
    path = Path(source).expanduser()
    if str(source) in BUNDLED_DATASETS and not (path / DATASET_FILE).is_file():
        path = ultravox_home() / "data" / str(source)
        if not (path / DATASET_FILE).is_file():
            raise DataError(f"dataset {source} is not fetched yet: run `ultravox data fetch {source}`")
    if not path.exists():
        names = ", ".join(BUNDLED_DATASETS)
        raise DataError(f"no dataset {source}: expected one of {names}, a dataset or audio folder, or a .jsonl file")
    if not (path / DATASET_FILE).is_file():
        raise DataError(f"{path} is not a dataset{_what_is_there(path)}")
    return path.absolute()


def _what_is_there(path: Path) -> str:
    """Why a file or folder is no dataset, by what is in it, and what to do."""
    if path.is_file():
        return f": a file of rows ends in {' or '.join(MANIFEST_SUFFIXES)}, or is a Parquet file"
    manifests = sorted(one.name for one in path.iterdir() if one.suffix in MANIFEST_SUFFIXES)
    if manifests:
        names = f"{', '.join(manifests[:MOST_NAMED])}{' …' if len(manifests) > MOST_NAMED else ''}"
        return f" folder: it has no {DATASET_FILE}, but {names}: name such a file itself, as {path / manifests[0]}"
    recording = next((one for one in sorted(path.rglob("*")) if one.suffix.lower() in AUDIO_SUFFIXES), None)
    if recording is not None:
        return (
            f" folder: it holds recordings, such as {recording.relative_to(path)}, and nothing says what is said in "
            f"them: write {path / 'metadata.csv'} with the first line file_name,text and a line for each recording"
        )
    return f" folder: it has neither {DATASET_FILE} nor metadata.csv"


def read_dataset(source: str | Path) -> dict[str, Any]:
    """The content of a dataset folder's ``dataset.json`` (name, licence, attribution, splits), or DataError."""
    path = dataset_folder(source) / DATASET_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}; fetch the dataset again") from error
    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise DataError(f"{path} does not describe a dataset: expected an object with splits")
    if info.get("version") != FORMAT_VERSION:
        raise DataError(f"{path} has format version {info.get('version')!r}, this program reads {FORMAT_VERSION}")
    return info


def split_file(source: str | Path, split: str) -> Path:
    """The rows' file of one split of a bundled dataset or of a dataset folder, which is the one that it should be."""
    folder, info = dataset_folder(source), read_dataset(source)
    if split not in info["splits"]:
        raise DataError(f"dataset {folder} has no split {split!r}: it has {', '.join(info['splits']) or 'none'}")
    entry = info["splits"][split]
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise DataError(f"{folder / DATASET_FILE}: split {split!r} names no file")
    path = folder / entry["file"]
    if (digest := entry.get("sha256")) and path.is_file() and sha256_file(path) != digest:
        raise DataError(
            f"{path} is not the file that {DATASET_FILE} was written for (its SHA-256 differs): "
            "fetch the dataset again, or name the .jsonl file itself"
        )
    return path


def is_whole(folder: str | Path) -> bool:
    """Whether a dataset folder is there and every split of it can be loaded; if not, it is worth making again."""
    try:
        found = [clip for split in read_dataset(folder)["splits"] for _, clip in read_rows(split_file(folder, split))]
    except DataError:
        return False
    return not any(isinstance(clip, RowFault) for clip in found)


def write_dataset(
    folder: str | Path,
    *,
    name: str,
    licence: str,
    attribution: str,
    splits: Mapping[str, Sequence[Clip]],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write the splits' .jsonl files, then ``dataset.json``; the clips' audio lies in ``folder`` already.

    ``extra`` are further keys for ``dataset.json``. Each file is written whole or not at all.
    """
    folder = Path(folder).absolute()
    entries: dict[str, dict[str, Any]] = {}
    for split, clips in splits.items():
        path = folder / f"{split}.jsonl"
        atomic_write(path, "".join(json.dumps(_row(clip, folder), ensure_ascii=False) + "\n" for clip in clips))
        entries[split] = {
            "file": path.name,
            "sha256": sha256_file(path),
            "num_clips": len(clips),
            "seconds": round(sum(clip.duration for clip in clips), 3),
        }
    info = {"version": FORMAT_VERSION, "name": name, "licence": licence, "attribution": attribution, "splits": entries}
    atomic_write(folder / DATASET_FILE, json.dumps({**info, **(extra or {})}, indent=2, ensure_ascii=False) + "\n")


def _row(clip: Clip, folder: Path) -> dict[str, Any]:
    assert isinstance(clip.audio, Path)
    row = {
        "id": clip.id,
        "audio": clip.audio.relative_to(folder).as_posix(),
        "text": clip.text,
        "duration": round(clip.duration, 4),
        "speaker": clip.speaker,
        "licence": clip.licence,
    }
    optional = {"language": clip.language or None, "answer": clip.answer}
    row |= {key: value for key, value in optional.items() if value is not None}
    return row | {key: value for key, value in clip.columns.items() if key not in row}


def read_rows(
    path: Path, columns: Columns | None = None, *, needs_audio: bool = True, licence: str = ""
) -> Iterator[tuple[str, Clip | RowFault]]:
    """Place and clip of each row of a manifest: one JSON object a line, in our keys or in those of NeMo's manifests."""
    reader = RowReader(columns or Columns(), file_below(path.parent), needs_audio, licence)
    return read_table(reader, ((place, row_of(line, place)) for place, line in read_lines(path)), path)


def read_table(
    reader: RowReader, rows: Iterable[tuple[str, dict[str, Any]]], path: Path
) -> Iterator[tuple[str, Clip | RowFault]]:
    """Place and clip of each row of a file. A row that only names its audio goes by that name."""
    row: dict[str, Any] = {}
    for index, (place, row) in enumerate(rows):
        if index == 0:
            reader.columns.require_essential(row, place)
        name = row.get("audio_filepath") or row.get("file_name")
        if name is not None and row.get("offset"):
            name = f"{name}@{row['offset']}"  # the parts of one recording are so many rows
        try:
            yield place, reader.clip(row, place, name)
        except RowFault as fault:
            yield place, fault
    if row:
        reader.columns.require_seen(str(path), row)


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Place ("file, line 3") and content of each line that is not blank, without a byte order mark."""
    with open_rows(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield f"{path}, line {number}", line


def open_rows(path: Path) -> BinaryIO:
    """A file of rows, open, or a DataError."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the manifest {path}: {error.strerror}") from error


def row_of(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object of a line, or a DataError."""
    if line.lstrip().startswith(b"[") and place.endswith(", line 1"):
        file = Path(place.removesuffix(", line 1"))
        lines = file.with_name(f"{file.stem}.lines.jsonl")
        raise DataError(
            f"{place}: a JSON array begins here: expected one JSON object on each line, as "
            f"`jq -c '.[]' {shlex.quote(str(file))} > {shlex.quote(str(lines))}` writes them"
        )
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not a whole JSON object ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise DataError(f"{place}: not an object that can be read ({str(error).partition(':')[0]})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row
