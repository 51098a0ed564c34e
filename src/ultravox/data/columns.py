"""What the columns of a source are called here: by a mapping that the user gives, else by the names that are usual."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ultravox.errors import DataError

#: Ours → the names that it goes by elsewhere, the first that is there. ``audio_filepath`` and ``lang`` are NeMo's,
#: ``file_name`` is of Hugging Face's audio folders, ``sentence`` and ``client_id`` are Common Voice's.
USUAL = {
    "id": ("id",),
    "audio": ("audio", "audio_filepath", "file_name"),
    "text": ("text", "transcription", "transcript", "sentence"),
    "duration": ("duration",),
    "offset": ("offset",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "licence": ("licence", "license"),
    "language": ("language", "lang", "locale"),
    "answer": ("answer",),
    "messages": ("messages",),
}

ESSENTIAL = ("id", "audio", "text", "messages")


class Columns:
    """Takes the columns that a clip is made of out of a row."""

    def __init__(self, mapping: Mapping[str, str] | None = None) -> None:
        """`mapping`: ours → theirs, in which a dot leads into an object. What is ours but not in `USUAL` is renamed."""
        self.mapping = dict(mapping or {})
        self._unseen = set(self.mapping)

    def of(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Ours → value (columns that are there, null or not), and the remaining columns under their own names."""
        ours: dict[str, Any] = {}
        used = set()
        for name, theirs in self.mapping.items():
            if has(row, theirs):
                self._unseen.discard(name)
                ours[name] = value_of(row, theirs)
                used.add(theirs)
        extra = {name: ours.pop(name) for name in list(ours) if name not in USUAL}
        for name, candidates in USUAL.items():
            if name not in self.mapping and (usual := next((c for c in candidates if c in row), None)) is not None:
                ours[name] = row[usual]
                used.add(usual)
        return ours, {name: value for name, value in row.items() if name not in used} | extra

    def place_of(self, name: str, there: Collection[str]) -> str | None:
        """What a column of ours is called in a source whose columns are known beforehand."""
        if name in self.mapping:
            return self.mapping[name]
        return next((candidate for candidate in USUAL[name] if candidate in there), None)

    def require(self, there: Iterable[str], place: str) -> None:
        """Raise a DataError when a mapped column is not among those that a source has."""
        there = list(there)
        for name, theirs in self.mapping.items():
            if theirs not in there and theirs.partition(".")[0] not in there:
                raise _unknown(place, name, theirs, there)

    def require_essential(self, row: Mapping[str, Any], place: str) -> None:
        """Raise a DataError when a row, the first, lacks a mapped column that every row must have."""
        for name in ESSENTIAL:
            if name in self.mapping and not has(row, self.mapping[name]):
                raise _unknown(place, name, self.mapping[name], list(row))

    def require_seen(self, place: str, row: Mapping[str, Any]) -> None:
        """Raise a DataError when a mapped column was in no row so far; `row` shows what is there instead."""
        for name in sorted(self._unseen):
            raise _unknown(place, name, self.mapping[name], list(row))


def read_as(theirs: str, mapping: Mapping[str, str]) -> str | None:
    """The name of ours that a column of a source is read under, where that is another one."""
    mapped = next((ours for ours, named in mapping.items() if named == theirs and ours != theirs), None)
    usual = (ours for ours, names in USUAL.items() if theirs in names and ours != theirs and ours not in mapping)
    return mapped or next(usual, None)


def has(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column, or a value at a name with dots."""
    if name in row:
        return True
    first, _, rest = name.partition(".")
    return bool(rest) and isinstance(row.get(first), Mapping) and has(row[first], rest)


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """A column, or the value at a name with dots. KeyError where it is not."""
    if name in row:
        return row[name]
    first, _, rest = name.partition(".")
    return value_of(row[first], rest)


def _unknown(place: str, name: str, theirs: str, there: list[str]) -> DataError:
    return DataError(
        f"{place} has no column {theirs!r} (named for {name!r}): its columns are {', '.join(there) or 'none'}"
    )
