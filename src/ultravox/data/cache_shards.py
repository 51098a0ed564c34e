"""One shard of cached features: a file of rows that only grows, and a small index of which entry stands where.

``000001.bin`` holds rows [frame, channel] of one number type and nothing else. ``000001.idx`` is a header and a record
of 32 bytes for each entry. It is written whole, after the rows, so that it names only rows that are there: a process
killed in between leaves rows that nothing names, and the next one writes over them. ``000001.use`` is a stamp: its time
is when a run last used the shard, its content the state of the shard in which every entry was found to be whole.
"""

import hashlib
import os
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ultravox.files import atomic_write

FORMAT_VERSION = 2

#: A shard is closed before it grows beyond this. One entry may be larger; then it has a shard of its own.
SHARD_BYTES = 256 << 20

#: A long build writes its index this often, so that an interrupted one goes on where it was.
SECONDS_BETWEEN_COMMITS = 30.0

#: One entry of an index: hash of its name, its rows, their CRC-32, and the samples of the clip at its own speed.
ENTRY = np.dtype([("name", "S16"), ("start", "<u4"), ("rows", "<u4"), ("crc", "<u4"), ("samples", "<u4")])

_MAGIC = b"UVSHARD\n"
_HEADER = struct.Struct("<8s I I 16s I I")  # magic, format version, entries, key, CRC-32 of the records, 0


def hash_name(name: str) -> bytes:
    """16 bytes by which an index knows an entry."""
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Shard:
    """The three files of one shard."""

    folder: Path
    number: int

    @property
    def data(self) -> Path:
        return self.folder / f"{self.number:06d}.bin"

    @property
    def index(self) -> Path:
        return self.folder / f"{self.number:06d}.idx"

    @property
    def stamp(self) -> Path:
        return self.folder / f"{self.number:06d}.use"

    def entries(self, key: str) -> np.ndarray | None:
        """What the index names, [entry] of `ENTRY`; None when it is damaged, or of another format or key."""
        try:
            content = self.index.read_bytes()
            magic, version, count, found_key, crc, _ = _HEADER.unpack_from(content)
        except (OSError, struct.error):
            return None
        records = memoryview(content)[_HEADER.size :]
        if (magic, version, found_key.hex()) != (_MAGIC, FORMAT_VERSION, key):
            return None
        if len(records) != count * ENTRY.itemsize or zlib.crc32(records) != crc:
            return None
        return np.frombuffer(records, ENTRY)

    def write_entries(self, key: str, entries: np.ndarray) -> None:
        """Replace the index, whole or not at all."""
        records = np.ascontiguousarray(entries, ENTRY).tobytes()
        header = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(entries), bytes.fromhex(key), zlib.crc32(records), 0)
        atomic_write(self.index, header + records)

    def rows(self, dtype: str, num_channels: int) -> np.ndarray:
        """All rows that the file has now, [frame, channel]: a read-only view of the memory-mapped file."""
        count = self.num_bytes(self.data) // (num_channels * np.dtype(dtype).itemsize)
        if not count:
            return np.zeros((0, num_channels), dtype)
        return np.memmap(self.data, dtype, "r", shape=(count, num_channels)).view(np.ndarray)

    def whole(self, entries: np.ndarray, dtype: str, num_channels: int) -> np.ndarray:
        """Which of its entries have the rows that were written, bool [entry]. Reads them all."""
        rows = self.rows(dtype, num_channels)
        found = [is_whole(rows, entry) for entry in entries.tolist()]
        return np.array(found, dtype=bool)

    def is_verified(self) -> bool:
        """Whether the rows are as they were when all of them were last found to be whole."""
        try:
            return self.stamp.read_text() == self._state()
        except OSError:
            return False

    def set_verified(self, verified: bool = True) -> None:
        """Remember that all entries are whole, or that they are to be looked at. It counts as a use."""
        self.stamp.write_text(self._state() if verified else "")  # half of it is a stamp that does not fit: no harm

    def touch(self) -> None:
        """Remember that it is used now."""
        self.stamp.touch()

    def last_use(self) -> float:
        """When it was last used, in seconds since 1970; 0 where nothing tells."""
        for path in (self.stamp, self.index, self.data):
            try:
                return path.stat().st_mtime
            except OSError:
                continue
        return 0.0

    def remove(self) -> int:
        """Remove its files, the index first; returns the bytes that are freed."""
        freed = 0
        for path in (self.index, self.data, self.stamp):
            freed += self.num_bytes(path)
            path.unlink(missing_ok=True)
        return freed

    @staticmethod
    def num_bytes(path: Path) -> int:
        """Size of one of its files; 0 where it is absent."""
        try:
            return path.stat().st_size
        except OSError:
            return 0

    def _state(self) -> str:
        stat = self.data.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"


def index_states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells an index from what was there before it, by the file's name: a new one is a new file."""
    states = {}
    for shard in find_shards(folder):
        with suppress(FileNotFoundError):
            stat = shard.index.stat()
            states[shard.index.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return states


def is_whole(rows: np.ndarray, entry: Sequence) -> bool:
    """Whether an entry's rows are there, and are what was written."""
    _, start, count, crc, _ = entry
    return start + count <= len(rows) and zlib.crc32(_bytes_of(rows[start : start + count])) == crc


def _bytes_of(rows: np.ndarray) -> memoryview:
    """The bytes of rows that stand one after the other, without a copy."""
    return rows.reshape(-1).view(np.uint8).data


def find_shards(folder: Path) -> list[Shard]:
    """All shards of a key's folder by number, broken ones too; none of a folder that is gone, also just now."""
    names: set[str] = set()
    with suppress(FileNotFoundError):  # another process clears it
        names = {path.stem for path in folder.iterdir() if path.suffix in (".bin", ".idx")}
    return [Shard(folder, int(name)) for name in sorted(names) if name.isdigit()]


class ShardWriter:
    """Appends entries to the last shard of a folder, then to new ones. The folder's lock must be held.

    A context manager: on an error, such as a full disk, what no index names is cut off again.

    Args:
        folder: of one key.
        key: its name, 32 hex digits.
        shard_bytes: see `SHARD_BYTES`.
        after: the last shard, which is gone on with while there is room; its rows must be whole.
        number: of the next new shard.
        reserve: called with the bytes of an entry and its shard before it is written; it may refuse.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        shard_bytes: int,
        after: Shard | None,
        number: int,
        reserve: Callable[[int, Shard], None],
    ) -> None:
        self.folder, self.key, self.shard_bytes, self.reserve = folder, key, shard_bytes, reserve
        self._after, self._next = after, number
        self._shard = Shard(folder, number)
        self._file: BinaryIO | None = None  # of `_shard`, once there is something to write
        self._num_rows = self._row_bytes = self._committed_bytes = 0
        self._entries: list[tuple] = []
        self._committed_at = 0.0

    def append(self, name: str, rows: np.ndarray, num_samples: int) -> None:
        """Add one entry of rows [frame, channel]."""
        self._row_bytes = rows.shape[1] * rows.itemsize
        if self._file is None or (self._entries and self._num_rows * self._row_bytes + rows.nbytes > self.shard_bytes):
            self._file = self._open(rows.nbytes)
        data = _bytes_of(np.ascontiguousarray(rows))
        self.reserve(data.nbytes, self._shard)
        self._file.write(data)
        self._entries.append((hash_name(name), self._num_rows, len(rows), zlib.crc32(data), num_samples))
        self._num_rows += len(rows)
        if time.monotonic() - self._committed_at > SECONDS_BETWEEN_COMMITS:
            self._commit()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._file is None:
            return
        if error is None:
            self._close()
            return
        with suppress(OSError):  # a full disk may refuse what is still in the buffer
            self._file.close()
        os.truncate(self._shard.data, self._committed_bytes)
        if not self._committed_bytes:
            self._shard.remove()

    def _open(self, num_bytes: int) -> BinaryIO:
        """Go on with the shard that is there, or begin one."""
        if self._file is not None:
            self._close()
        entries: list[tuple] = []
        self._shard, size = Shard(self.folder, self._next), 0
        if self._after is not None:
            there = self._after.entries(self.key)
            assert there is not None, "the caller has looked"
            end = int((there["start"].astype(np.int64) + there["rows"]).max(initial=0)) * self._row_bytes
            if end + num_bytes <= self.shard_bytes:
                self._shard, entries, size = self._after, there.tolist(), end
            self._after = None
        self._next = max(self._next, self._shard.number + 1)
        file = self._shard.data.open("ab")
        file.truncate(size)  # what a killed builder left behind the rows that the index names
        self._entries, self._num_rows, self._committed_bytes = entries, size // self._row_bytes, size
        self._committed_at = time.monotonic()
        return file

    def _commit(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._shard.write_entries(self.key, np.array(self._entries, ENTRY))
        self._committed_bytes, self._committed_at = self._num_rows * self._row_bytes, time.monotonic()

    def _close(self) -> None:
        self._commit()
        assert self._file is not None
        self._file.close()
        self._shard.set_verified()
