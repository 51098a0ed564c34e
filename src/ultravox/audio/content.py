"""Where encoded audio is: a file, or a place inside something else (a Parquet cell, a part of a recording)."""

import hashlib
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
