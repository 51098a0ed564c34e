"""Clips by the name of a source, whatever its kind.

A source is the name of a bundled dataset, a folder with a ``dataset.json``, a folder with a ``metadata.csv`` or
``metadata.jsonl`` (the audio folders of Hugging Face ``datasets``), or one manifest file, ours or NeMo's.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultravox.data.manifest import (
    DATASET_FILE,
    Clip,
    clip_of,
    collect,
    load_split,
    read_content,
    read_dataset,
    read_lines,
    read_rows,
    row_of,
)
from ultravox.errors import DataError

MANIFEST_SUFFIXES = (".jsonl", ".json")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
TEXT_COLUMNS = ("transcription", "transcript", "text", "sentence")  # the first that is there
ROOT_SPLIT = "train"  # of a metadata file that lies beside no split's folder


def load_clips(source: str | Path, split: str = "train") -> list[Clip]:
    """The clips of one split of a source; a manifest file is one split, whatever it is called.

    Errors (DataError) name the file and the line.
    """
    if is_manifest(source):
        return read_rows(Path(source).expanduser())
    metadata = _metadata_files(source)
    if not metadata:
        return load_split(source, split)
    if split not in metadata:
        raise DataError(f"audio folder {source} has no split {split!r}: it has {', '.join(metadata)}")
    return _read_metadata(metadata[split])


def split_names(source: str | Path) -> list[str]:
    """The splits of a source; a manifest file is one, called as the file."""
    if is_manifest(source):
        return [Path(source).stem]
    return list(_metadata_files(source) or read_dataset(source)["splits"])


def describe_source(source: str | Path) -> dict[str, Any]:
    """What a source's ``dataset.json`` says about it; nothing where it has none. DataError where there is no source."""
    return {} if is_manifest(source) or _metadata_files(source) else read_dataset(source)


def is_manifest(source: str | Path) -> bool:
    """Whether a source is one manifest file."""
    return Path(source).suffix in MANIFEST_SUFFIXES


def _metadata_files(source: str | Path) -> dict[str, Path]:
    """Split → metadata file of an audio folder; empty for another kind of source."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or (folder / DATASET_FILE).is_file():
        return {}
    if beside := [folder / name for name in METADATA_FILES if (folder / name).is_file()]:
        return {ROOT_SPLIT: beside[0]}
    below = sorted((path for name in METADATA_FILES for path in folder.glob(f"*/{name}")), reverse=True)
    return {path.parent.name: path for path in below}  # a folder's .csv comes after its .jsonl, and is taken


def _read_metadata(path: Path) -> list[Clip]:
    """Rows of a metadata file: ``file_name``, a text, and what else of our keys there is."""
    json_rows = ((place, row_of(line, place)) for place, line in read_lines(path))
    rows = _csv_rows(path) if path.suffix == ".csv" else json_rows

    def clips() -> Iterator[tuple[str, Clip]]:
        for place, row in rows:
            text = next((name for name in TEXT_COLUMNS if name in row), None)
            if "file_name" not in row or text is None:
                columns = ", ".join(row) or "none"
                raise DataError(
                    f"{place}: expected the column file_name and one of {', '.join(TEXT_COLUMNS)}, found {columns}"
                )
            ours = {"id": row["file_name"], "speaker": str(row.get("speaker_id", "")), **row}
            yield place, clip_of({**ours, "audio": row["file_name"], "text": row[text]}, path, place)

    return collect(path, clips())


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of each row; an empty cell counts as absent, unless it is the text."""
    text = read_content(path)
    try:
        reader = csv.DictReader(io.StringIO(text.decode("utf-8"), newline=""), strict=True)
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: expected {len(reader.fieldnames or ())} columns, as in the first line")
            kept = {key: value for key, value in row.items() if value or key in TEXT_COLUMNS}
            yield place, kept | ({"duration": _number(kept["duration"])} if "duration" in kept else {})
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _number(text: str) -> float | str:
    """A cell's number; a cell that is none stays a text, which is refused where its row is checked."""
    try:
        return float(text)
    except ValueError:
        return text
