"""One row of any source, checked: a recording and what is said in it, a conversation, or a text alone."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from ultravox.audio.content import NO_AUDIO, Audio
from ultravox.audio.segment import SLACK_SECONDS, AudioSegment
from ultravox.audio.waveform import audio_seconds
from ultravox.data.columns import Columns
from ultravox.errors import AudioError, DataError
from ultravox.tokens import AUDIO_TOKEN

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Clip:
    """One row of a dataset: a recording and what is said in it; or several recordings; or, with `NO_AUDIO`, a text.

    A file's path is absolute, ``duration`` is in seconds, 0 without audio.
    """

    id: str
    audio: Audio
    text: str
    duration: float
    speaker: str = ""
    licence: str = ""
    answer: str | None = None
    language: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What else the row holds, for prompt templates."""
    more_audio: tuple[tuple[Audio, float], ...] = ()
    """Further recordings of a conversation and their seconds, in the order in which it hears them."""
    messages: tuple[Mapping[str, str], ...] | None = None
    """A whole conversation: role and content of each turn, with a placeholder for each recording."""


class RowFault(DataError):
    """One row that cannot be used, in a source whose other rows can. `reason` is what it is counted under."""

    def __init__(self, reason: str, name: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.name = reason, name


@dataclass(frozen=True, slots=True)
class RowReader:
    """What a source says about all of its rows."""

    columns: Columns
    locate: Callable[[Any], Audio]
    """The audio that a row's value stands for. AudioError when it is not there."""
    needs_audio: bool = True
    """Whether a row of text alone is a fault."""
    licence: str = ""
    """Of rows that name none."""
    seconds_of: Callable[[Audio], float] = field(default_factory=lambda: _remembering(audio_seconds))
    """Length by the header. The last few are kept: parts of one recording stand beside one another."""

    def clip(self, row: Mapping[str, Any], place: str, default_id: str | None = None) -> Clip:
        """The clip of a row.

        Args:
            row: the columns by the source's names.
            place: for messages ("file, line 3").
            default_id: of a row without one.

        Raises:
            RowFault: something is wrong with this row's audio, duration or conversation.
            DataError: a key is missing or is no text, so that something is wrong with the source.
        """
        ours, rest = self.columns.of(row)
        if ours.get("id") is None and default_id is not None:
            ours["id"] = default_id
        _check_types(ours, place, self.needs_audio)
        name = str(ours["id"])
        if (half := _half_character([*ours.values(), *rest.values()])) is not None:
            name = name.encode("utf-8", "backslashreplace").decode()  # it is written to files
            raise RowFault("not Unicode", name, f"{place}: the row holds {half!r}, half of a character")
        audio = ours.get("audio")
        heard = [] if audio is None else audio if isinstance(audio, list) else [audio]
        if not heard and self.needs_audio:
            raise RowFault("without audio", name, f"{place}: the row has no audio")
        reason = "missing audio"
        try:
            there = [self.locate(one) for one in heard]
            reason = "damaged audio"
            recordings = self._recordings(ours, there, name, place)
        except AudioError as error:
            raise RowFault(reason, name, f"{place}: {error}") from error
        messages = _messages(ours.get("messages"), len(recordings), name, place)
        (first, seconds), *more = recordings or [(NO_AUDIO, 0.0)]
        return Clip(
            name,
            first,
            ours.get("text") or "",
            seconds,
            str(_or_empty(ours.get("speaker"))),
            ours.get("licence") or self.licence,
            ours.get("answer"),
            ours.get("language") or "",
            rest,
            tuple(more),
            messages,
        )

    def _recordings(self, ours: dict[str, Any], heard: list[Audio], name: str, place: str) -> list[tuple[Audio, float]]:
        """Each recording of a row with its seconds, cut out where the row says where it begins."""
        given = ours.get("duration")
        durations = given if isinstance(given, list) else [given] if len(heard) == 1 else [None] * len(heard)
        if len(durations) != len(heard):
            message = f"{place}: {len(durations)} durations for {len(heard)} recordings: name each"
            raise RowFault("bad duration", name, message)
        durations = [_number(duration) for duration in durations]
        for duration in durations:
            if duration is not None and not _is_seconds(duration):
                message = f"{place}: 'duration' must be a number of seconds above 0, got {duration!r}"
                raise RowFault("bad duration", name, message)
        if ours.get("offset") is not None and len(heard) == 1:
            return [self._part(heard[0], _number(ours["offset"]), durations[0], name, place)]
        return [
            (audio, float(self.seconds_of(audio) if duration is None else duration))
            for audio, duration in zip(heard, durations, strict=True)
        ]

    def _part(self, audio: Audio, offset: Any, duration: Any, name: str, place: str) -> tuple[Audio, float]:
        """The part of a recording that a row with an offset names; the whole where that is all of it."""
        if offset != 0 and not _is_seconds(offset):
            raise RowFault(
                "bad offset", name, f"{place}: 'offset' must be a number of seconds, 0 or more, got {offset!r}"
            )
        total = self.seconds_of(audio)
        seconds = total - offset if duration is None else duration
        if offset + seconds > total + SLACK_SECONDS or seconds <= 0:
            message = f"{place}: {audio} ends at {total:.2f} s, the row's part at {offset + seconds:.2f} s"
            raise RowFault("beyond its recording", name, message)
        if offset == 0 and seconds > total - SLACK_SECONDS:
            return audio, float(seconds)
        return AudioSegment(audio, float(offset), float(seconds)), float(seconds)


def file_below(folder: Path) -> Callable[[Any], Audio]:
    """Finds the file that a row names, relative to a folder. AudioError when it does not exist."""
    base = os.path.abspath(folder)

    def locate(value: Any) -> Audio:
        if not isinstance(value, str):
            raise AudioError(f"'audio' must be a string, or a list of them, got {value!r}")
        path = os.path.join(base, value)
        if not os.path.isfile(path):
            raise no_file(path if value else "")
        return Path(path)

    return locate


def no_file(path: str) -> AudioError:
    """What to say of a place where an audio file was to be."""
    if not path:
        return AudioError("'audio' names no file: it is empty")
    return AudioError(
        f"{path} is a folder: name an audio file in it"
        if os.path.isdir(path)
        else f"the audio file {path} does not exist"
    )


def _remembering(function: Callable[[Audio], float]) -> Callable[[Audio], float]:
    return cast(Callable[[Audio], float], lru_cache(16)(function))


def _check_types(ours: Mapping[str, Any], place: str, needs_audio: bool) -> None:
    required = ["id", *(["audio"] if needs_audio else [])]
    if ours.get("messages") is None and ours.get("answer") is None:
        required.append("text")
    for key in required:
        if key not in ours:
            raise DataError(f"{place}: the key {key!r} is missing")
    for key in ("id", "text", "speaker", "licence", "language", "answer"):
        value = ours.get(key)
        is_number = key in ("id", "speaker") and isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not isinstance(value, str) and not is_number:
            raise DataError(f"{place}: {key!r} must be a string, got {value!r}")
    if ours["id"] is None:
        raise DataError(f"{place}: the key 'id' is missing")


def _half_character(values: Iterable[Any]) -> str | None:
    """What no file can hold in UTF-8: JSON can name one half of a surrogate pair, and a cut text ends in one."""
    try:
        for value in values:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, list | tuple | dict):
                json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        return error.object[error.start : error.end]
    return None


def _or_empty(value: Any) -> Any:
    return "" if value is None else value


def _number(value: Any) -> Any:
    """A number that stands in a text, as in a CSV cell; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_seconds(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < float("inf")


def _messages(value: Any, num_recordings: int, name: str, place: str) -> tuple[Mapping[str, str], ...] | None:
    """The turns of a conversation, checked; None where the row is none."""
    if value is None:
        if num_recordings > 1:
            message = f"{place}: {num_recordings} recordings in one row need 'messages' that say where each is heard"
            raise RowFault("bad messages", name, message)
        return None
    turns = list(value) if isinstance(value, list | tuple) else []
    for turn in turns:
        if not (isinstance(turn, Mapping) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)):
            message = f"{place}: a message must have a role ({', '.join(ROLES)}) and a content, got {turn!r}"
            raise RowFault("bad messages", name, message)
    if not turns:
        message = f"{place}: 'messages' must be a list of turns with role and content, got {value!r}"
        raise RowFault("bad messages", name, message)
    placeholders = sum(turn["content"].count(AUDIO_TOKEN) for turn in turns)
    if placeholders != num_recordings:
        raise RowFault(
            "recordings and placeholders differ",
            name,
            f"{place}: {num_recordings} recordings, {placeholders} {AUDIO_TOKEN} placeholders in row {name}",
        )
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
