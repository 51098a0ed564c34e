"""Datasets as Hugging Face ``datasets`` keeps them: on the hub, saved to disk, or as Parquet files; whole or streamed.

Only Arrow tables are asked of ``datasets``: it would decode audio with torchcodec, which not every machine can load.
A map-style dataset's audio stays where it is, as `ArrowCell`; a streamed row brings its bytes along while it lives.
"""

import contextlib
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ultravox.audio.content import Audio
from ultravox.data import arrow_audio
from ultravox.data.arrow_audio import ArrowCell, EmbeddedAudio, RemoteAudio
from ultravox.data.clip import RowFault, RowReader, no_file
from ultravox.data.source import Row, ShardedSource, SourceSpec
from ultravox.errors import DataError, NetworkError
from ultravox.files import ultravox_home

ROWS_AT_ONCE = 64
TAIL_BYTES = (
    1 << 20
)  # of a file on this machine, for the fingerprint of a stream; a Parquet file's statistics stand there
SAVED_DICT, SAVED_STATE = "dataset_dict.json", "state.json"


class HuggingFaceSource(ShardedSource):
    """A dataset by its id on the hub or by its place on this machine."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self.is_local = spec.path.exists()
        self.root = spec.path if spec.path.is_dir() else spec.path.parent if self.is_local else None
        if self.is_local and spec.revision is not None:
            raise DataError(f"{spec.name} lies on this machine, where it has no revisions: leave revision out")
        short = spec.path.name if self.is_local else spec.name
        self._label = f"{short}, {spec.split}"

    def splits(self) -> list[str]:
        if self.is_local and (files := local_files(self.spec.path)):
            return list(files)
        import datasets

        with _explained(self.spec):
            return list(datasets.get_dataset_split_names(*self._place(), revision=self.spec.revision))

    def describe(self) -> dict[str, Any]:
        """Licence and citation, where the dataset tells them."""
        from huggingface_hub import DatasetCard

        found: dict[str, Any] = {}
        for file in [*self.spec.path.glob("dataset_info.json"), *self.spec.path.glob("*/dataset_info.json")][:1]:
            info = json.loads(file.read_text(encoding="utf-8"))
            found = {"licence": info.get("license"), "attribution": info.get("citation")}
        with contextlib.suppress(Exception):  # a dataset without a card, or no network: then nothing is stated
            card = DatasetCard.load(self.spec.path / "README.md" if self.is_local else self.name)
            licence = card.data.get("license") or ""
            found["licence"] = ", ".join(licence) if isinstance(licence, list) else str(licence)
        return {key: value for key, value in found.items() if value}

    @cached_property
    def licence(self) -> str:  # type: ignore[override]
        return str(self.describe().get("licence", ""))

    def rows(self) -> Iterator[Row]:
        if self.spec.streaming:
            for shard in range(self.num_shards):
                yield from self.shard_rows(shard)
        else:
            yield from self._stored_rows()

    # Map-style

    def _stored_rows(self) -> Iterator[Row]:
        dataset = self._stored()
        reader, features = self._reader(dataset.column_names), dataset.features
        number = 0
        for entry in dataset.cache_files:
            file, in_file = entry["filename"], 0
            for batch in arrow_audio.table_of(file).to_batches():
                for row in _row_dicts(batch, self._audio_keys(batch.schema.names), features, (self._label, number)):
                    label = f"{self._label}, row {number}"
                    yield self._row(reader, row, label, f"{self.spec.split}-{number}", (file, in_file))
                    number, in_file = number + 1, in_file + 1

    def _stored(self) -> Any:
        """The whole split, memory-mapped."""
        import datasets

        spec = self.spec
        with _explained(spec):
            if spec.path.is_dir() and is_saved(spec.path):
                folder = spec.path / spec.split if (spec.path / SAVED_DICT).is_file() else spec.path
                self._require_split(list(local_files(spec.path)))
                dataset = datasets.load_from_disk(str(folder))
            else:
                files = self._local_split()
                place = ("parquet",) if files else self._place()
                options = {"data_files": {spec.split: files}} if files else {"revision": spec.revision}
                home = {"cache_dir": str(ultravox_home() / "datasets")} if self.is_local else {}
                with _explained(spec, files):
                    dataset = datasets.load_dataset(*place, split=spec.split, **options, **home)
        there = sum(arrow_audio.table_of(entry["filename"]).num_rows for entry in dataset.cache_files)
        if there != dataset.num_rows:
            raise DataError(f"{self.name}: {spec.split!r} is a part of a split; name the split, and use max_clips")
        return dataset

    # Streaming

    @property
    def num_shards(self) -> int:
        """Files, or parts of them."""
        return int(self.stream.num_shards)

    @cached_property
    def stream(self) -> Any:
        """The split as an ``IterableDataset`` of Arrow tables; nothing of it is read yet."""
        with _explained(self.spec, self._local_split()):
            return self._builder.as_streaming_dataset(split=self.spec.split).with_format("arrow")

    def shard_rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        features, number = self.stream.features, 0
        reader: RowReader | None = None
        with _explained(self.spec, self._local_split()):
            for table in self.stream.shard(self.num_shards, shard).iter(batch_size=ROWS_AT_ONCE):
                reader = reader or self._reader(table.column_names)
                number += table.num_rows
                if number <= start:
                    continue
                rest = table.slice(max(0, table.num_rows - (number - start)))
                first = number - rest.num_rows
                for batch in rest.combine_chunks().to_batches():
                    within = f"{self._label}, shard {shard}"
                    for row in _row_dicts(batch, self._audio_keys(batch.schema.names), features, (within, first)):
                        label = f"{within}, row {first}"
                        yield self._row(reader, row, label, f"{self.spec.split}-{shard}-{first}", None)
                        first += 1

    def fingerprint(self) -> str:
        """Of a stream: the options, and name, size and end of each file, or the commit that it is of on the hub."""
        if not self.spec.streaming:
            return super().fingerprint()
        digest = hashlib.sha256(repr(self.spec.options()).encode())
        for name in self._builder.config.data_files[self.spec.split]:
            digest.update(_file_identity(name, self.root).encode())
        return digest.hexdigest()

    @cached_property
    def _builder(self) -> Any:
        import datasets

        files = self._local_split()
        with _explained(self.spec, files):
            if files:
                kind = "arrow" if files[0].endswith(".arrow") else "parquet"
                return datasets.load_dataset_builder(kind, data_files={self.spec.split: files})
            return datasets.load_dataset_builder(*self._place(), revision=self.spec.revision)

    # Both

    def _place(self) -> tuple[str, str | None]:
        return (str(self.spec.path.absolute()) if self.is_local else self.name), self.spec.subset

    def _local_split(self) -> list[str]:
        """The files of the split on this machine; none where ``datasets`` has to find them."""
        files = local_files(self.spec.path) if self.is_local else {}
        if files:
            self._require_split(list(files))
        return files.get(self.spec.split, [])

    def _require_split(self, there: list[str]) -> None:
        if self.spec.split not in there:
            raise DataError(f"{self.name} has no split {self.spec.split!r}: it has {', '.join(there)}")

    def _reader(self, names: list[str]) -> RowReader:
        self.columns.require(names, self.name)
        needs_audio, licence = self.spec.needs_audio, self.licence
        if needs_audio and self._audio_keys(names) is None:
            raise DataError(
                f"{self.name} has no column called audio; name it in columns, as audio: NAME. Its columns are "
                f"{', '.join(names)}"
            )
        return RowReader(self.columns, self._locate, needs_audio, licence, arrow_audio.seconds_of)

    def _audio_keys(self, names: list[str]) -> tuple[str, ...] | None:
        """The audio's column, and the fields inside it that a name with dots leads through."""
        name = self.columns.place_of("audio", names)
        return None if name is None else (name,) if name in names else tuple(name.split("."))

    def _row(self, reader: RowReader, row: dict[str, Any], label: str, name: str, place: tuple[str, int] | None) -> Row:
        for column, value in row.items():
            if isinstance(value, _Cell):
                row[column] = value.placed(label, place)
        try:
            return label, reader.clip(row, label, name)
        except RowFault as fault:
            return label, fault

    def _locate(self, value: Any) -> Audio:
        assert isinstance(value, _Cell)
        content, path = arrow_audio.parts_of(value.scalar)
        suffix = Path(path).suffix if path else ""
        if content is not None and value.place is not None:
            return ArrowCell(*value.place, value.keys, value.label, content.size, suffix)
        if content is not None:
            return EmbeddedAudio(content.to_pybytes(), value.label, suffix)
        assert path is not None
        if "://" in path:
            return RemoteAudio(path)
        file = Path(path) if self.root is None else self.root.absolute() / path
        if not file.is_file():
            raise no_file(str(file))
        return file


class _Cell:
    """The audio of one row, before it is looked at."""

    def __init__(self, scalar: pa.Scalar, keys: arrow_audio.Keys) -> None:
        self.scalar, self.keys = scalar, keys
        self.label = ""
        self.place: tuple[str, int] | None = None

    def placed(self, label: str, place: tuple[str, int] | None) -> Any:
        """Itself, with where it lies; a list of them for a list; None where there is no audio."""
        if not self.scalar.is_valid:
            return None
        if pa.types.is_list(self.scalar.type) or pa.types.is_large_list(self.scalar.type):
            inner = [_Cell(one, (*self.keys, index)) for index, one in enumerate(self.scalar)]
            return [cell for one in inner if (cell := one.placed(f"{label}, audio {one.keys[-1]}", place)) is not None]
        if all(part is None for part in arrow_audio.parts_of(self.scalar)):
            return None
        self.label, self.place = label, place
        return self


def _row_dicts(
    batch: pa.RecordBatch, audio: tuple[str, ...] | None, features: Any, place: tuple[str, int]
) -> Iterator[dict[str, Any]]:
    """The rows of a table: the audio as a `_Cell` under its name, other media left out, labels as words.

    `place` is where the table lies and the number of its first row there, for messages.
    """
    kinds = {name: type(feature).__name__ for name, feature in (features or {}).items()}
    media = {name for name, kind in kinds.items() if kind in ("Audio", "Image", "Video")}
    names = [name for name in batch.schema.names if name not in media and (audio is None or (name,) != audio)]
    labels = {name: features[name].names for name in names if features and hasattr(features[name], "int2str")}
    for index, row in enumerate(_plain_rows(batch.select(names), *place)):
        for name, words in labels.items():
            row[name] = words[row[name]] if row[name] is not None and row[name] >= 0 else None
        if audio is not None:
            scalar = arrow_audio.walk(batch.column(audio[0])[index], audio[1:])
            if len(audio) > 1:
                inner = row
                for key in audio[:-1]:
                    inner = inner[key]
                inner.pop(audio[-1])  # the bytes themselves are nobody's column
            row[".".join(audio)] = _Cell(scalar, audio)
        yield row


def _plain_rows(batch: pa.RecordBatch, where: str, first: int) -> list[dict[str, Any]]:
    """The rows as Python has them. DataError for a text that is not UTF-8, which Arrow lets pass."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            for name in batch.schema.names:
                try:
                    batch.column(name)[row].as_py()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{where}, row {first + row}: the column {name!r} is not UTF-8; write the file again"
                    ) from error
        raise


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (folder / SAVED_DICT).is_file() or (folder / SAVED_STATE).is_file()


def local_files(path: Path) -> dict[str, list[str]]:
    """Split → files of a dataset on this machine; empty where ``datasets`` must read its card to know.

    A Parquet file is of the split that its name begins with ("test-00000-of-00004.parquet"), else that its folder is
    called, else "train".
    """
    found: dict[str, list[str]] = {}
    if path.is_file():
        return {"train": [str(path.absolute())]}
    if (path / SAVED_DICT).is_file():
        parts = {name: path / name for name in json.loads((path / SAVED_DICT).read_text())["splits"]}
    elif (path / SAVED_STATE).is_file():
        parts = {json.loads((path / SAVED_STATE).read_text()).get("_split") or "train": path}
    else:
        for file in [] if (path / "README.md").is_file() else sorted(path.rglob("*.parquet")):
            named = re.match(r"(.+?)-\d+(-of-\d+)?$", file.stem)
            folder = file.relative_to(path).parts[0] if file.parent != path else "data"
            split = named[1] if named else "train" if folder == "data" else folder
            found.setdefault(split, []).append(str(file.absolute()))
        return found
    for name, folder in parts.items():
        state = json.loads((folder / SAVED_STATE).read_text())
        found[name] = [str((folder / entry["filename"]).absolute()) for entry in state["_data_files"]]
    return found


def _file_identity(name: str, root: Path | None) -> str:
    """What tells a data file from a changed one: its address with its commit, or its size and end."""
    path = Path(name)
    if not path.is_file():
        return f"{name}\n"
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - TAIL_BYTES))
        end = hashlib.sha256(file.read()).hexdigest()
    shown = path.relative_to(root.absolute()) if root and path.is_relative_to(root.absolute()) else path
    return f"{shown} {size} {end}\n"


@contextlib.contextmanager
def _explained(spec: SourceSpec, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn the errors of ``datasets`` into ours: one line, with the dataset's name or the bad one of `files`."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs, it raises too: one line is enough
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    except DatasetNotFoundError as error:
        raise DataError(f"no dataset {spec.name}: no folder or file is called so, nor a dataset on the hub") from error
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise NetworkError(
            f"no folder or file is called {spec.name}, and the hub cannot be asked for a dataset of that name "
            f"({_first_line(error)}): correct the name, or connect to the network for the first use"
        ) from error
    except (DatasetsError, ValueError, OSError, pa.ArrowException) as error:
        causes: Iterable[BaseException] = (error.__cause__, error) if error.__cause__ else (error,)
        if bad := next(_bad_files(files), None):
            raise DataError(bad) from error
        raise DataError(f"{spec.name} cannot be read: {': '.join(map(_first_line, causes))}") from error


def _bad_files(files: Sequence[str]) -> Iterator[str]:
    """What is wrong with each Parquet file that is damaged or without a row. It reads them: for an error at hand."""
    import pyarrow.parquet as pq

    for file in files:
        if not file.endswith(".parquet"):
            continue
        try:
            with pq.ParquetFile(file) as opened:
                if not opened.metadata.num_rows:
                    yield f"{file} holds no clips: write the dataset without it, or name a split that holds some"
                for _ in opened.iter_batches():
                    pass
        except (OSError, ValueError, pa.ArrowException) as error:
            yield f"{file} is damaged ({_first_line(error)}): copy or download it again"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
