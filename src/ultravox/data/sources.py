"""Clips by the name of a source, whatever its kind: the one door to every dataset.

`open_source` finds what kind a name means, `load_source` also filters, and sets aside what cannot be used.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ultravox.audio.content import NO_AUDIO
from ultravox.data.audio_folder import AudioFolderSource, metadata_files
from ultravox.data.clip import Clip, RowFault
from ultravox.data.filters import num_characters, total_seconds
from ultravox.data.manifest import (
    BUNDLED_DATASETS,
    DATASET_FILE,
    MANIFEST_SUFFIXES,
    dataset_folder,
    read_dataset,
    read_rows,
    split_file,
)
from ultravox.data.quarantine import Quarantine
from ultravox.data.source import Fingerprint, Row, ShardedSource, Source, SourceSpec, unrepeated
from ultravox.errors import DataError

__all__ = [
    "KINDS",
    "LoadedSource",
    "Source",
    "SourceSpec",
    "describe_source",
    "is_manifest",
    "load_clips",
    "load_source",
    "open_source",
    "read_all",
    "require_not_shrunk",
    "split_names",
]

PREPARED_FILE = "prepared.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class ManifestSource(Source):
    """One manifest file, ours or NeMo's: one split, called as the file."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self.root = spec.path.parent
        self.require_file()

    def splits(self) -> list[str]:
        return [self.spec.path.stem]

    def rows(self) -> Iterator[Row]:
        return read_rows(self.spec.path, self.columns, needs_audio=self.spec.needs_audio)


class DatasetSource(Source):
    """A bundled dataset, or a folder with a ``dataset.json``."""

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self._info = read_dataset(spec.name)
        self.root = dataset_folder(spec.name)
        self.licence, self.attribution = (str(self._info.get(key) or "") for key in ("licence", "attribution"))

    def splits(self) -> list[str]:
        return list(self._info["splits"])

    def rows(self) -> Iterator[Row]:
        path = split_file(self.spec.name, self.spec.split)
        return read_rows(path, self.columns, needs_audio=self.spec.needs_audio, licence=self.licence)

    def describe(self) -> dict[str, Any]:
        return self._info


class PreparedSource(ShardedSource):
    """What ``ultravox data prepare`` wrote; its columns are ours already."""

    reads_again = True

    def __init__(self, spec: SourceSpec) -> None:
        super().__init__(spec)
        self.root = spec.path
        self._prepared = import_module("ultravox.data.prepared")
        self._info = self._prepared.describe_prepared(spec.path)
        self.licence, self.attribution = (str(self._info.get(key) or "") for key in ("licence", "attribution"))
        if spec.columns:
            raise DataError(f"{spec.name} is prepared, with our columns in it: leave columns out")

    def splits(self) -> list[str]:
        return list(self._prepared.prepared_splits(self.spec.path))

    def rows(self) -> Iterator[Row]:
        if self.spec.split not in self.splits():
            raise DataError(f"{self.name} has no split {self.spec.split!r}: it has {', '.join(self.splits())}")
        for number, clip in enumerate(self._prepared.iter_prepared(self.spec.path, self.spec.split)):
            yield f"{self.name}, row {number}", clip

    @cached_property
    def _shards(self) -> list[Path]:
        return list(self._prepared.shard_paths(self.spec.path, self.spec.split))

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        for number, clip in enumerate(islice(self._prepared.shard_clips(self._shards[shard]), start, None), start):
            yield f"{self.name}, shard {shard}, row {number}", clip

    def at(self, rows: np.ndarray | None) -> Sequence[Clip]:
        from ultravox.data.prepared_clips import PreparedClips

        return PreparedClips(self.spec.path, self.spec.split, rows)

    def fingerprint(self) -> str:
        """Of the options, and of all content by the hashes of its files: no row is read."""
        return hashlib.sha256(repr((self.spec.options(), self._info["fingerprint"])).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return self._info


def _huggingface(spec: SourceSpec) -> Source:
    from ultravox.data.huggingface import HuggingFaceSource

    return HuggingFaceSource(spec)


def _lhotse(spec: SourceSpec) -> Source:
    from ultravox.data.lhotse_source import LhotseSource

    return LhotseSource(spec)


KINDS: dict[str, Callable[[SourceSpec], Source]] = {
    "manifest": ManifestSource,
    "dataset": DatasetSource,
    "prepared": PreparedSource,
    "audio_folder": AudioFolderSource,
    "huggingface": _huggingface,
    "lhotse": _lhotse,
}


def kind_of(name: str | Path) -> str:
    """The kind of source that a name means, by what is there; "dataset" where nothing is, for its error says most."""
    path = Path(name).expanduser()
    if path.name.endswith((".jsonl.gz", ".jsonl.bz2")):
        return "lhotse"
    if is_manifest(name):
        return "manifest"
    if path.is_file():
        return "huggingface" if path.suffix == ".parquet" else "dataset"
    if path.is_dir():
        if (path / PREPARED_FILE).is_file():
            return "prepared"
        if (path / DATASET_FILE).is_file():
            return "dataset"
        if metadata_files(path):
            return "audio_folder"
        from ultravox.data.huggingface import is_saved, local_files
        from ultravox.data.lhotse_source import lhotse_splits

        if is_saved(path) or local_files(path):
            return "huggingface"
        if lhotse_splits(path):
            return "lhotse"
        return "huggingface" if next(path.rglob("*.parquet"), None) else "dataset"
    is_id = HUB_ID.fullmatch(str(name)) and str(name) not in BUNDLED_DATASETS
    return "huggingface" if is_id and not path.parent.is_dir() else "dataset"


def open_source(spec: SourceSpec) -> Source:
    """The source that a configuration asks for; nothing of its rows is read yet.

    Raises:
        DataError: there is none of that name, or its description is broken.
    """
    kind = kind_of(spec.name) if spec.format == "auto" else spec.format
    if kind not in KINDS:
        raise DataError(f"{spec.name}: no format {kind!r}: expected auto or one of {', '.join(KINDS)}")
    if kind != "huggingface" and (spec.subset or spec.revision):
        raise DataError(f"{spec.name}: subset and revision are of Hugging Face datasets, this is {kind}")
    if kind not in ("huggingface", "prepared") and spec.streaming:
        raise DataError(
            f"{spec.name}: only Hugging Face datasets and prepared folders can be streamed, this is {kind}: leave "
            "streaming out, or run `ultravox data prepare` first"
        )
    return KINDS[kind](spec)


@dataclass(frozen=True, slots=True)
class LoadedSource:
    """The clips of a source that are used, and those that are not."""

    clips: Sequence[Clip]
    left_out: dict[str, list[str]]
    """Reason → ids: rows that cannot be used, and those outside the filters."""
    fingerprint: str
    """Of the options and of the clips that are used."""
    num_rows: int
    """Rows that were looked at, for shares of them."""


def load_source(spec: SourceSpec, on_progress: Callable[[int], None] | None = None) -> LoadedSource:
    """Read, check, filter and cap a source.

    Args:
        spec: what is asked for. With a cap, rows behind it are not read.
        on_progress: called with the rows that were read so far.

    Raises:
        DataError: the source is broken, or no clip is left.
    """
    source = open_source(spec)
    if source.reads_again and spec.takes_all and (every := source.at(None)):
        return LoadedSource(every, {}, source.fingerprint(), len(every))
    digest, quarantine = Fingerprint(source), Quarantine()
    clips: list[Clip] = []
    places: list[int] = []
    most_seconds = float("inf") if spec.max_hours is None else spec.max_hours * 3600
    num_rows, seconds, languages = 0, 0.0, set()
    for place, found in source.rows() if source.reads_again else unrepeated(source.rows()):
        num_rows += 1
        if on_progress is not None:
            on_progress(num_rows)
        if isinstance(found, RowFault):
            quarantine.add_row(found.reason, found.name, place)
            continue
        languages.add(found.language or "none named")
        if reason := usable_reason(found) or spec.filters.reason(found):
            quarantine.add_row(reason, found.id, place)
            continue
        seconds += total_seconds(found)
        if seconds > most_seconds:
            break
        if source.reads_again:
            places.append(num_rows - 1)
        else:
            clips.append(found)
            digest.add(found)
        if max(len(clips), len(places)) == spec.max_clips:
            break
    if not num_rows:
        raise DataError(f"{spec.name}, split {spec.split}, holds no clips")
    if not clips and not places:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(quarantine.counts().items()))
        seen = f"; its languages: {', '.join(sorted(languages))}" if spec.filters.languages else ""
        raise DataError(
            f"{spec.name}, split {spec.split}: no clip is left of {num_rows} "
            f"({reasons or 'the first is longer than max_hours'}{seen}): check its filters and its columns"
        )
    if source.reads_again:
        return LoadedSource(source.at(np.array(places)), quarantine.reasons, source.fingerprint(), num_rows)
    return LoadedSource(clips, quarantine.reasons, digest.hexdigest(), num_rows)


def usable_reason(clip: Clip) -> str | None:
    """Why nothing can be learnt from a clip, whatever the task: no text at all; None where something can.

    A row without audio has its texts in columns of its own, which only its prompts know.
    """
    if clip.audio is NO_AUDIO:
        return None
    has_text = num_characters(clip.text) or clip.messages or num_characters(clip.answer or "")
    return None if has_text else "without text"


def require_not_shrunk(spec: SourceSpec, before: int, now: int) -> None:
    """Raise a DataError when a source has fewer clips than a run recorded when it began."""
    if now < before:
        raise DataError(
            f"{spec.name}, split {spec.split}, has shrunk: {before} clips were recorded, {now} are there; "
            "restore the missing ones, or begin a new run"
        )


def load_clips(source: str | Path, split: str = "train", *, format: str = "auto") -> list[Clip]:
    """Every clip of one split of a source; a manifest file is one split, for training or held out or as it is called.

    Raises:
        DataError: at the first row that cannot be used, with its file and line; or there are no rows.
    """
    spec = SourceSpec(str(source), format, split, unnamed_splits=("train", "heldout"))
    return read_all(open_source(spec), strict=True)[0]


def read_all(source: Source, most: int | None = None, *, strict: bool = False) -> tuple[list[Clip], list[RowFault]]:
    """The clips of a source, all or the first `most`, and the rows that give none.

    Raises:
        DataError: the source is broken, or has no rows; with `strict`, at the first row that gives no clip.
    """
    clips: list[Clip] = []
    faults: list[RowFault] = []
    for _, found in islice(unrepeated(source.rows()), most):
        if isinstance(found, Clip):
            clips.append(found)
        elif strict:
            raise found
        else:
            faults.append(found)
    if not clips and not faults:
        split = "" if is_manifest(source.name) else f", split {source.spec.split!r},"
        raise DataError(f"{source.name}{split} holds no clips")
    return clips, faults


def split_names(source: str | Path) -> list[str]:
    """The splits of a source; a manifest file is one, called as the file."""
    return open_source(SourceSpec(str(source))).splits()


def describe_source(source: str | Path) -> dict[str, Any]:
    """What a source says about itself (licence, attribution …), if anything. DataError where there is no source."""
    return open_source(SourceSpec(str(source))).describe()


def is_manifest(source: str | Path) -> bool:
    """Whether a source is one manifest file."""
    return Path(source).suffix in MANIFEST_SUFFIXES
