"""Audio folders as Hugging Face ``datasets`` knows them: a ``metadata.csv`` or ``metadata.jsonl`` beside the files."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultravox.data.clip import RowReader, file_below
from ultravox.data.columns import USUAL
from ultravox.data.manifest import BYTE_ORDER_MARK, open_rows, read_lines, read_table, row_of
from ultravox.data.source import Row, Source, SourceSpec
from ultravox.errors import DataError

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
ROOT_SPLIT = "train"  # of a metadata file that lies beside no split's folder


class AudioFolderSource(Source):
    """A folder with a metadata file, or with one in the folder of each split."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self.root = spec.path
        self._files = metadata_files(spec.path)

    def splits(self) -> list[str]:
        if not self._files:
            raise DataError(f"{self.name} is no audio folder: expected a {' or '.join(METADATA_FILES)} in it")
        return list(self._files)

    def rows(self) -> Iterator[Row]:
        splits = self.splits()
        if self.spec.split not in splits:
            raise DataError(f"audio folder {self.name} has no split {self.spec.split!r}: it has {', '.join(splits)}")
        path = self._files[self.spec.split]
        json_rows = ((place, row_of(line, place)) for place, line in read_lines(path))
        table = _csv_rows(path) if path.suffix == ".csv" else json_rows
        reader = RowReader(self.columns, file_below(path.parent), self.spec.needs_audio)
        return read_table(reader, self._checked(table), path)

    def _checked(self, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows, of which the first must have the columns that a metadata file has."""
        for index, (place, row) in enumerate(rows):
            named = self.columns.mapping
            has_text = named.keys() & {"text", "answer", "messages"} or row.keys() & {*USUAL["text"], "messages"}
            if index == 0 and not ((named.get("audio") or "file_name" in row) and has_text):
                raise DataError(
                    f"{place}: expected the column file_name and one of {', '.join(USUAL['text'])}, found "
                    f"{', '.join(row) or 'none'}"
                )
            yield place, row


def metadata_files(folder: Path) -> dict[str, Path]:
    """Split → metadata file of an audio folder; empty for any other folder."""
    if beside := [folder / name for name in METADATA_FILES if (folder / name).is_file()]:
        return {ROOT_SPLIT: beside[0]}
    below = sorted((path for name in METADATA_FILES for path in folder.glob(f"*/{name}")), reverse=True)
    return {path.parent.name: path for path in below}  # a folder's .csv comes after its .jsonl, and is taken


def _check_head(path: Path, names: list[str]) -> None:
    """DataError when the first line of a CSV file is not the names of columns, separated by commas."""
    if not names:
        raise DataError(f"{path} is empty: expected a first line such as file_name,text and a line for each recording")
    for sign, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "upright strokes")):
        if len(names) == 1 and sign in names[0]:
            raise DataError(
                f"{path}, line 1: the columns are separated by {called} ({names[0]!r}): expected commas; save it "
                "again as CSV with commas"
            )
    if recording := next((name for name in names if name and (path.parent / name).is_file()), None):
        raise DataError(
            f"{path}, line 1: expected the names of the columns, found a row (of {recording}): add a first line "
            "such as file_name,text"
        )


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of each row; an empty cell is null."""
    with open_rows(path) as file:
        text = file.read().removeprefix(BYTE_ORDER_MARK)
    try:
        reader = csv.DictReader(io.StringIO(text.decode("utf-8"), newline=""), strict=True)
        _check_head(path, list(reader.fieldnames or ()))
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: expected {len(reader.fieldnames or ())} columns, as in the first line")
            yield place, {key: value or None for key, value in row.items()}
    except UnicodeDecodeError as error:
        line = text[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
