"""Texts to be spoken, each with where it comes from; and which of them are taken."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ultravox.data.journal import Journal
from ultravox.data.manifest import read_lines, row_of
from ultravox.data.splits import HeldoutFilter
from ultravox.errors import DataError
from ultravox.files import sha256_file

STRINGS = ("id", "text", "answer", "language", "licence")
# what a row says about its speech; a text's own columns of these names are kept under SOURCE_PREFIX + name
OURS = (
    *("audio", "duration", "speaker", "text_source", "voice", "engine", "engine_version", "speed", "seed"),
    *("text_licence", "voice_licence", "answered_by"),
)
SOURCE_PREFIX = "source_"


@dataclass(frozen=True, slots=True)
class SpokenText:
    """A text to be spoken. ``source`` is its place: a file's line, a template, a language model's prompt."""

    text: str
    source: str
    id: str = ""
    answer: str | None = None
    language: str = ""
    licence: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class TextSource(Protocol):
    """Where texts come from."""

    @property
    def costly(self) -> bool:
        """Whether texts take time or money, so that they are kept in the journal; the others can be had beforehand."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides the texts."""
        ...

    def texts(self, journal: Journal | None) -> Iterator[SpokenText]:
        """Candidates in order; costly ones need a journal, are kept in it, and come from there the next time."""
        ...


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A text that is not spoken, and why."""

    text: SpokenText
    reason: str


@dataclass(frozen=True)
class FileTexts:
    """A ``.txt`` with a text on each line, or a ``.jsonl`` of rows with "text" and whatever else."""

    path: Path
    costly = False

    def settings(self) -> dict[str, Any]:
        """See ``TextSource``. The file is known by its content."""
        if self.path.suffix not in (".txt", ".jsonl"):
            raise DataError(f"{self.path}: expected texts in a .txt or a .jsonl file")
        try:
            return {"file": self.path.name, "sha256": sha256_file(self.path)}
        except OSError as error:
            raise DataError(f"cannot read the texts {self.path}: {error.strerror}") from error

    def texts(self, journal: Journal | None = None) -> Iterator[SpokenText]:
        """See ``TextSource``. DataError names file and line."""
        for place, line in read_lines(self.path):
            source = f"{self.path.name}:{place.rpartition(' ')[2]}"
            if self.path.suffix == ".txt":
                try:
                    yield SpokenText(line.decode("utf-8"), source)
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8; save the file as UTF-8") from error
            else:
                yield _from_row(row_of(line, place), source, place)


def _from_row(row: Mapping[str, Any], source: str, place: str) -> SpokenText:
    if "text" not in row:
        raise DataError(f"{place}: the key 'text' is missing: it has {', '.join(row) or 'none'}")
    known = {key: row[key] for key in STRINGS if row.get(key) is not None}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(f"{place}: {key!r} must be a string, got {value!r}")
    others = {key: value for key, value in row.items() if key not in STRINGS}
    return SpokenText(source=source, columns=own_columns(others), **known)


def own_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """A text's further columns, with a prefix where the name is one of ours."""
    return {f"{SOURCE_PREFIX}{key}" if key in OURS else key: value for key, value in values.items()}


def select_texts(
    candidates: Iterable[SpokenText], num_texts: int | None, allowed: HeldoutFilter, max_characters: int
) -> tuple[list[SpokenText], list[LeftOut]]:
    """The first `num_texts` (None = all) usable candidates, white space collapsed; and those left out before the last.

    Left out are: empty, longer than `max_characters`, held out, or the same words as an earlier one. DataError when
    there are too few.
    """
    chosen: list[SpokenText] = []
    left_out: list[LeftOut] = []
    first: dict[str, str] = {}
    ids: dict[str, str] = {}
    for text in candidates:
        words = " ".join(text.text.split())
        text = replace(text, text=words)
        key = _same_words(words)
        if reason := _fault(words, key, first, allowed, max_characters):
            left_out.append(LeftOut(text, reason))
            continue
        first[key] = text.source
        if text.id and (other := ids.setdefault(text.id, text.source)) != text.source:
            raise DataError(f"{text.source}: id {text.id!r} is already used in {other}")
        chosen.append(text)
        if len(chosen) == num_texts:
            break
    if not chosen or (num_texts is not None and len(chosen) < num_texts):
        wanted = f"{num_texts} are asked for" if num_texts else "at least one is needed"
        reasons = f" ({len(left_out)} left out, the first: {left_out[0].reason})" if left_out else ""
        raise DataError(f"there are {len(chosen) or 'no'} usable texts{reasons}, but {wanted}")
    return chosen, left_out


def _fault(words: str, key: str, first: Mapping[str, str], allowed: HeldoutFilter, max_characters: int) -> str:
    if not re.search(r"\w", words):
        return "no words"
    if len(words) > max_characters:
        return f"longer than {max_characters} characters"
    if key in first:
        return f"same words as {first[key]}"
    return "" if allowed.allows(words) else "held out"


def _same_words(text: str) -> str:
    """What two texts of the same words have in common, in any language: letters and digits, without case."""
    return " ".join(re.sub(r"[^\w']|_", " ", text.casefold()).split())


def digest(content: Any) -> str:
    """Twelve hex digits that name a template or prompt."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:12]
