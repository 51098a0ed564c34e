"""Where encoded audio is: a file, or a place inside something else (a Parquet cell, a part of a recording)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ultravox.errors import AudioError
from ultravox.files import sha256_file


@runtime_checkable
class AudioContent(Protocol):
    """Encoded audio that is no file of its own. Implementations are hashable, small, and can be pickled.

    ``str`` of it is its name in messages.
    """

    @property
    def suffix(self) -> str:
        """As of a file name (".wav"); empty where it is not known."""
        ...

    def read(self) -> bytes:
        """The whole content. AudioError when it is not there."""
        ...


Audio = Path | AudioContent


@dataclass(frozen=True, slots=True)
class NoAudio:
    """In the place of a recording, in a row that is text alone."""

    suffix: str = ""

    def read(self) -> bytes:
        """There is nothing to read: always an AudioError."""
        raise AudioError("a row without audio was to be heard: use it with the task 'text', or give it audio")

    def __str__(self) -> str:
        return "no audio"


NO_AUDIO = NoAudio()


def read_audio(audio: Audio) -> bytes:
    """The encoded bytes of either kind. AudioError when they are not there."""
    if isinstance(audio, Path):
        try:
            return audio.read_bytes()
        except OSError as error:
            raise AudioError(f"{audio} cannot be read: {error.strerror}") from error
    return audio.read()


def audio_sha256(audio: Audio) -> str:
    """Hex SHA-256 of the encoded bytes. AudioError when they are not there."""
    if isinstance(audio, Path):
        try:
            return sha256_file(audio)
        except OSError as error:
            raise AudioError(f"{audio} cannot be read: {error.strerror}") from error
    return hashlib.sha256(audio.read()).hexdigest()
