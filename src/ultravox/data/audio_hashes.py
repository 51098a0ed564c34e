"""SHA-256 of audio files, remembered between runs, so that a large corpus is not read at each start just to be named.

One small file for all runs: a record of 72 bytes for each path, with the size and the times that the file had when it
was read. Beside the time of change of its content (mtime) stands that of its inode (ctime): a file that is replaced by
one of the same size and mtime, as from a reproducible archive, is noticed. A file that changed within the last two
seconds is not remembered, since it may change once more within the clock's grain (git calls such a file racily clean).
"""

import fcntl
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ultravox.audio.content import Audio, audio_sha256
from ultravox.errors import AudioError
from ultravox.files import atomic_write, make_folder

FORMAT_VERSION = 1
RACY_SECONDS = 2.0
NUM_THREADS = 8  # a disk answers several at once better, and hashing leaves Python's lock

_RECORD = np.dtype([("path", "S16"), ("size", "<u8"), ("mtime", "<i8"), ("ctime", "<i8"), ("sha256", "u1", 32)])
_MAGIC = b"UVHASHES"
_HEADER = struct.Struct("<8s I I")  # magic, format version, CRC-32 of the records


class AudioHashes:
    """The table in one file. It is a cache: when it is absent, damaged or of another version, files are read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_read = 0
        """Audio whose content was read."""

    def find(self, audios: Iterable[Audio]) -> dict[Audio, str | None]:
        """Hex SHA-256 of each audio's encoded bytes; None where it is not there.

        Audio that is no file of its own may know its hash: `sha256()`. Else it is read.
        """
        found: dict[Audio, str | None] = dict.fromkeys(audios)
        files = [audio for audio in found if isinstance(audio, Path)]
        records, remembered = self._look_up(files)
        digests = records["sha256"].tobytes().hex()
        for index in np.flatnonzero(remembered):
            found[files[index]] = digests[64 * index : 64 * (index + 1)]
        unknown = [audio for audio, digest in found.items() if digest is None]
        self.num_read += sum(not hasattr(audio, "sha256") for audio in unknown)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            found.update(zip(unknown, pool.map(_digest, unknown), strict=True))
        self._remember(files, records, remembered, found)
        return found

    def _look_up(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """What is known of each file: records [file] as the files are now, and whether the table has their hash."""
        records = np.zeros(len(files), _RECORD)
        paths, stats = [], []
        for file in files:
            name = os.path.abspath(file)
            paths.append(hashlib.blake2b(os.fsencode(name), digest_size=16).digest())
            try:
                stat = os.stat(name)
                stats.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
            except (OSError, ValueError):
                stats.append((0, 0, -1))  # no file has this ctime
        table = self._load()
        if not files or not len(table):
            at = np.zeros(len(files), np.int64)
        else:
            names = np.ascontiguousarray(table["path"])
            at = np.minimum(np.searchsorted(names, np.array(paths, "S16")), len(names) - 1)
        if files:
            records["path"] = paths
            records["size"], records["mtime"], records["ctime"] = np.array(stats, np.int64).T
        remembered = np.full(len(files), bool(len(table)))
        if len(table):
            for field in ("path", "size", "mtime", "ctime"):
                remembered &= table[field][at] == records[field]
            records["sha256"] = np.where(remembered[:, None], table["sha256"][at], 0)
        return records, remembered

    def _remember(
        self, files: list[Path], records: np.ndarray, remembered: np.ndarray, found: dict[Audio, str | None]
    ) -> None:
        """Add what was read to the table, beside what other processes have added meanwhile."""
        recent = time.time_ns() - int(RACY_SECONDS * 1e9)
        settled = np.maximum(records["mtime"], records["ctime"]) < recent
        new = [i for i in np.flatnonzero(~remembered & settled) if found[files[i]] is not None]
        make_folder(self.path.parent)
        if not new or not os.access(self.path.parent, os.W_OK):  # a cache on a read-only disk is used as it is
            return
        added = records[new]
        added["sha256"] = np.array([list(bytes.fromhex(found[files[i]] or "")) for i in new], np.uint8)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            table = np.concatenate([self._load(), added])
            table = table[np.argsort(table["path"], kind="stable")]
            last = np.append(table["path"][1:] != table["path"][:-1], True)  # of one path's records, the newest
            content = table[last].tobytes()
            atomic_write(self.path, _HEADER.pack(_MAGIC, FORMAT_VERSION, zlib.crc32(content)) + content)

    def _load(self) -> np.ndarray:
        """The records, by path."""
        try:
            content = self.path.read_bytes()
            magic, version, crc = _HEADER.unpack_from(content)
        except (OSError, struct.error):
            return np.zeros(0, _RECORD)
        records = memoryview(content)[_HEADER.size :]
        if (magic, version) != (_MAGIC, FORMAT_VERSION) or zlib.crc32(records) != crc:
            return np.zeros(0, _RECORD)
        return np.frombuffer(records, _RECORD)


def _digest(audio: Audio) -> str | None:
    try:
        return audio.sha256() if hasattr(audio, "sha256") else audio_sha256(audio)
    except AudioError:
        return None
