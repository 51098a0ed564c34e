"""Audio that lies in a cell of an Arrow table, as Hugging Face ``datasets`` keeps it, or at an address beside one.

A cell is ``{bytes, path}``, or bytes or a path alone. `ArrowCell` remembers the place only, so it goes to a worker
process in a few bytes and reads the memory-mapped file there. Nothing here decodes: ``datasets`` would need torchcodec.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from ultravox.audio.content import Audio
from ultravox.audio.waveform import audio_seconds
from ultravox.errors import AudioError

Keys = tuple[str | int, ...]
"""A column and what leads from its cell to the audio: names of an object's fields, places in a list."""


@dataclass(frozen=True, slots=True)
class ArrowCell:
    """Encoded audio in a row of an Arrow file on this machine. `num_bytes` tells a cell that was changed."""

    file: str
    row: int
    keys: Keys
    label: str
    num_bytes: int
    suffix: str = ""

    def read(self) -> bytes:
        """The content. AudioError when the file has gone, or is another one by now."""
        content = self.buffer().to_pybytes()
        if len(content) != self.num_bytes:
            raise AudioError(f"{self} is not what it was ({len(content)} bytes): {self.file} was changed, start again")
        return content

    def buffer(self) -> pa.Buffer:
        """The content where it lies, uncopied."""
        try:
            scalar = walk(table_of(self.file).column(self.keys[0])[self.row], self.keys[1:])
        except (OSError, pa.ArrowInvalid, KeyError, IndexError) as error:
            raise AudioError(f"{self} cannot be read from {self.file} ({error})") from error
        content, _ = parts_of(scalar)
        if content is None:
            raise AudioError(f"{self} holds no audio any more: {self.file} was changed")
        return content

    def __str__(self) -> str:
        return f"{self.label} ({self.num_bytes} bytes)"


@dataclass(frozen=True, slots=True)
class EmbeddedAudio:
    """Encoded audio that came with a streamed row: there is no other place to read it from again."""

    content: bytes
    label: str
    suffix: str = ""

    def read(self) -> bytes:
        """The content."""
        return self.content

    def __str__(self) -> str:
        return f"{self.label} ({len(self.content)} bytes)"


@dataclass(frozen=True, slots=True)
class RemoteAudio:
    """Encoded audio at an address that fsspec knows ("hf://…", "s3://…")."""

    address: str

    @property
    def suffix(self) -> str:
        return Path(self.address).suffix

    def read(self) -> bytes:
        """The content. AudioError when it cannot be had."""
        import fsspec

        try:
            with fsspec.open(self.address, "rb") as file:
                return file.read()
        except Exception as error:  # each file system has errors of its own
            raise AudioError(f"{self.address} cannot be read: {' '.join(str(error).split())}") from error

    def __str__(self) -> str:
        return self.address


def walk(scalar: pa.Scalar, keys: Keys) -> pa.Scalar:
    """The value inside a cell that some keys lead to."""
    for key in keys:
        scalar = scalar[key]
    return scalar


def parts_of(scalar: pa.Scalar) -> tuple[pa.Buffer | None, str | None]:
    """Content and path of an audio cell, either of them None."""
    if not scalar.is_valid:
        return None, None
    if pa.types.is_struct(scalar.type):
        names = {field.name for field in scalar.type}
        content = scalar["bytes"].as_buffer() if "bytes" in names else None
        return content, scalar["path"].as_py() if "path" in names else None
    if is_binary(scalar.type):
        return scalar.as_buffer(), None
    return None, scalar.as_py()


def is_binary(kind: pa.DataType) -> bool:
    """Whether a column holds bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def seconds_of(audio: Audio) -> float:
    """`audio_seconds`; of a cell, without copying it."""
    if isinstance(audio, ArrowCell):
        return audio_seconds(pa.BufferReader(audio.buffer()), str(audio))
    return audio_seconds(audio)


@lru_cache(maxsize=256)
def table_of(file: str) -> pa.Table:
    """A memory-mapped Arrow file; every process maps it for itself, once."""
    with pa.memory_map(file) as source:
        return pa.ipc.open_stream(source).read_all()
