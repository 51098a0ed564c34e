"""What a source of clips is, whatever its kind: how it is asked for, and what it answers.

A kind is a subclass of `Source` that says which splits there are and yields its rows one by one. Which kind a name
means is found in `ultravox.data.sources`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ultravox.audio.content import Audio
from ultravox.audio.segment import AudioSegment
from ultravox.data.clip import Clip, RowFault
from ultravox.data.columns import Columns
from ultravox.data.filters import Filters
from ultravox.data.quarantine import ID_TWICE
from ultravox.errors import DataError

Row = tuple[str, Clip | RowFault]
"""The place of a row, for messages, and its clip, or why it has none."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """A source as a configuration asks for it."""

    name: str
    """A bundled dataset, a folder, a file, or the id of a Hugging Face dataset."""
    format: str = "auto"
    """A kind of `sources.KINDS`, or auto = by what is there."""
    split: str = "train"
    unnamed_splits: tuple[str, ...] = ("train",)
    """What `split` is where nobody named one: a file that is one split takes it for its own."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    revision: str | None = None
    """Commit, tag or branch of a dataset on the hub."""
    streaming: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column → theirs, in which a dot leads into an object."""
    filters: Filters = field(default_factory=Filters)
    max_clips: int | None = None
    max_hours: float | None = None
    needs_audio: bool = True
    """Whether a row of text alone is a fault: it is, for every task but "text"."""

    @property
    def path(self) -> Path:
        """The name as a place on this machine."""
        return Path(self.name).expanduser()

    @property
    def takes_all(self) -> bool:
        """Whether every row that can be used is."""
        return self.filters == Filters() and self.max_clips is None and self.max_hours is None

    def options(self) -> dict[str, Any]:
        """All that decides which clips come, apart from where they lie."""
        names = ("split", "subset", "revision", "filters", "max_clips", "max_hours", "needs_audio")
        return {"columns": sorted(self.columns.items())} | {name: getattr(self, name) for name in names}


class Source(ABC):
    """One split of one dataset."""

    licence: str = ""
    attribution: str = ""
    reads_again: bool = False
    """Whether any row is read quickly (`at`), so that none needs to be kept. Such a source has no faulty rows."""
    root: Path | None = None
    """The folder that its files lie in; its fingerprint does not tell where that is."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.columns = Columns(spec.columns)

    @property
    def name(self) -> str:
        return self.spec.name

    @abstractmethod
    def splits(self) -> list[str]:
        """Every split of the dataset. DataError where there is no such dataset."""

    def require_file(self) -> None:
        """Raise a DataError when the source is one file, and the split that is asked for is another one."""
        (mine,) = self.splits()
        if self.spec.split not in (mine, *self.spec.unnamed_splits):
            raise DataError(
                f"{self.name} has no split {self.spec.split!r}: it is one file, which is the one split {mine!r}, "
                "whatever its rows say; leave split out, or write a file for each split"
            )

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows of the split, one by one. DataError where the source itself, not a row, is broken."""

    def at(self, rows: np.ndarray | None) -> Sequence[Clip]:
        """The clips of some rows, [clip], by their numbers (None = of all), where `reads_again`."""
        raise NotImplementedError(f"{self.name} is read from its beginning to its end alone")

    def clips(self) -> Iterator[Clip]:
        """The clips of the split, one by one, unfiltered.

        Raises:
            DataError: at the first row that cannot be used.
        """
        for _, found in self.rows():
            if isinstance(found, RowFault):
                raise found
            yield found

    def fingerprint(self) -> str:
        """Hex SHA-256 of the options and of every row: its texts and figures, and which audio it names.

        It reads all rows, and no audio where the rows tell their durations.
        """
        digest = Fingerprint(self)
        for _, found in self.rows():
            digest.add(found)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What the dataset says about itself; nothing where it is only files."""
        return {}


class ShardedSource(Source):
    """A source in parts that can be read apart from one another, so that it can be streamed."""

    @property
    @abstractmethod
    def num_shards(self) -> int:
        """How many parts there are."""

    @abstractmethod
    def shard_rows(self, shard: int, start: int = 0) -> Iterator[Row]:
        """The rows of one part, from its `start`-th on."""


class Fingerprint:
    """Gathers the rows of a source into one hash, as they come."""

    def __init__(self, source: Source) -> None:
        self._root = None if source.root is None else source.root.absolute()
        self._digest = hashlib.sha256(repr(source.spec.options()).encode())

    def add(self, row: Clip | RowFault) -> None:
        """Add the next row."""
        if isinstance(row, RowFault):
            parts: tuple[Any, ...] = (row.reason, row.name)
        else:
            audio = [(self._reference(row.audio), row.duration), *((self._reference(a), s) for a, s in row.more_audio)]
            texts = (row.id, row.text, row.answer, row.messages, row.speaker, row.licence, row.language)
            parts = (*texts, audio, dict(row.columns))
        content = repr(parts).encode("utf-8", "surrogatepass")
        self._digest.update(len(content).to_bytes(8, "little") + content)

    def hexdigest(self) -> str:
        """The hash of what was added so far."""
        return self._digest.hexdigest()

    def _reference(self, audio: Audio) -> str:
        if isinstance(audio, AudioSegment):
            return f"{self._reference(audio.audio)} {audio.start} {audio.seconds} {audio.channel}"
        if isinstance(audio, Path) and self._root is not None and audio.is_relative_to(self._root):
            return audio.relative_to(self._root).as_posix()
        return str(audio)


def unrepeated(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, of which a second one with the same id is a fault."""
    places: dict[str, str] = {}
    for place, found in rows:
        if isinstance(found, Clip):
            here = place.rpartition(", ")[2]
            if (there := places.setdefault(found.id, here)) != here:
                found = RowFault(ID_TWICE, found.id, f"{place}: id {found.id!r} is already used in {there}")
        yield place, found
