"""The folder of all cached features: who uses which part of it, what is in it, and what goes when it is too large.

``features/<key>/`` belongs to one `CacheKey`: ``key.json`` says in words what that is, ``lock`` is held by the one who
builds (exclusively), ``readers`` by everyone who has the features open (shared), and beside them are the shards.
Whoever removes anything holds ``readers`` exclusively, so that nothing goes that a running process uses. The kernel
frees a lock when its process dies, however it dies. Folders of format version 1 hold ``index.json`` and ``shard.bin``.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from ultravox.audio.lengths import SAMPLE_RATE
from ultravox.data.cache_shards import FORMAT_VERSION, Shard, find_shards
from ultravox.errors import DataError
from ultravox.files import locked, make_folder, ultravox_home

KEY_FILE, LOCK_FILE, READERS_FILE = "key.json", "lock", "readers"
HASHES_FILE = "audio-hashes.bin"
_OLD_INDEX = "index.json"
_KEY_NAME = re.compile("[0-9a-f]{32}")
_TRASH = ".removed."


def features_folder() -> Path:
    """Where all cached features are."""
    return ultravox_home() / "features"


def features_bytes() -> int:
    """What all cached features take on disk."""
    return _size(features_folder())


def hold(folder: Path) -> IO:
    """Say that this process uses a key's folder (made if need be), until the file that comes back is closed."""
    path = folder / READERS_FILE
    while True:
        make_folder(folder)
        try:
            file = path.open("r" if path.exists() else "a")  # "r" is enough, and works on a read-only disk
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            continue  # removed between two of these lines
        file.close()


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Keep other builders of a key out; waits for one that is there, and says so. The folder must be held."""
    with locked(folder / LOCK_FILE, f"computes features in {folder}"):
        yield


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Take a lock file exclusively without waiting; yields whether nobody else has it. An absent one is free."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open())
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def alone_but_for(held: IO) -> Iterator[bool]:
    """`alone` for one who holds the folder: `held` is what `hold` gave, and holds it again afterwards."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = True
    except BlockingIOError:
        found = False
    try:
        yield found
    finally:
        fcntl.flock(held, fcntl.LOCK_SH)


def read_key_file(folder: Path) -> dict[str, Any] | None:
    """What a folder's ``key.json`` says; None when it is absent or damaged."""
    try:
        content = json.loads((folder / KEY_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@dataclass(slots=True)
class KeyInfo:
    """What one key's folder holds."""

    id: str
    """The folder's name."""
    version: int | None
    """Of the format; None = it does not say."""
    encoder: str
    preprocessing: str
    num_channels: int
    dtype: str
    made_by: str
    num_entries: int = 0
    audio_seconds: float = 0.0
    """Of all entries; a clip at two speeds counts twice."""
    num_bytes: int = 0
    last_use: float = 0.0
    """Seconds since 1970."""
    in_use: bool = False
    """By a running process."""
    num_unreadable_shards: int = 0
    num_damaged_entries: int | None = None
    """None = nobody looked."""

    @property
    def health(self) -> str:
        """In words."""
        if self.version is None:
            return f"without a readable {KEY_FILE}: the next run that needs it writes one"
        if self.version != FORMAT_VERSION:
            kind = "older" if self.version < FORMAT_VERSION else "newer"
            return f"of {kind} format: not used by this version; clear it"
        faults = [f"{self.num_unreadable_shards} shards unreadable"] * bool(self.num_unreadable_shards)
        faults += [f"{self.num_damaged_entries} entries damaged"] * bool(self.num_damaged_entries)
        return ", ".join(faults) or ("not checked" if self.num_damaged_entries is None else "whole")


def key_folders() -> list[Path]:
    """The folders of all keys, of all versions of the format, by name."""
    return sorted(path for path in features_folder().glob("[!.]*") if path.is_dir() and _KEY_NAME.fullmatch(path.name))


def describe(folder: Path, verify: bool = False, on_shard: Callable[[], None] = lambda: None) -> KeyInfo:
    """What a key's folder holds; `verify` reads and checks all of it. `on_shard` is called for each shard."""
    said = read_key_file(folder)
    if said is None and (folder / _OLD_INDEX).is_file():
        return _describe_version_1(folder)
    said = said or {}
    key = said["key"] if isinstance(said.get("key"), dict) else {}
    info = KeyInfo(
        folder.name,
        int(said["version"]) if isinstance(said.get("version"), int) else None,
        str(said.get("encoder") or _short_hash(key)),
        str(key.get("preprocessing", "unknown")),
        int(key.get("num_channels", 0)),
        str(key.get("dtype", "unknown")),
        str(said.get("made_by", "unknown")),
        num_bytes=_size(folder),
        num_damaged_entries=0 if verify else None,
    )
    shards = find_shards(folder)
    info.last_use = max((shard.last_use() for shard in shards), default=folder.stat().st_mtime)
    with alone(folder / READERS_FILE) as free:
        info.in_use = not free
    for shard in shards if info.version == FORMAT_VERSION else []:
        on_shard()
        entries = shard.entries(folder.name)
        if entries is None:  # one that is being written has no index yet
            info.num_unreadable_shards += shard.index.exists() or not info.in_use
            continue
        info.num_entries += len(entries)
        info.audio_seconds += float(entries["samples"].sum(dtype=np.int64)) / SAMPLE_RATE
        if verify:
            damaged = int((~shard.whole(entries, info.dtype, info.num_channels)).sum())
            info.num_damaged_entries = (info.num_damaged_entries or 0) + damaged
            if damaged:
                shard.set_verified(False)  # so that the next run that needs it looks, and makes it again
    return info


def _describe_version_1(folder: Path) -> KeyInfo:
    index = folder / _OLD_INDEX
    key: dict[str, Any] = {}
    entries, samples = {}, []
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads(index.read_bytes())
        key, entries, samples = content.get("key", {}), content.get("entries", {}), content.get("num_samples", [])
    info = KeyInfo(
        folder.name,
        1,
        _short_hash(key),
        str(key.get("preprocessing", "unknown")),
        int(key.get("num_channels", 0)),
        str(key.get("dtype", "unknown")),
        "unknown",
        num_entries=len(entries),
        audio_seconds=sum(count or 0 for count in samples) / SAMPLE_RATE,
        num_bytes=_size(folder),
        last_use=index.stat().st_mtime,
    )
    with alone(folder / LOCK_FILE) as free:
        info.in_use = not free
    return info


def _short_hash(key: dict[str, Any]) -> str:
    """What an encoder is called of which no name is known."""
    return f"weights {str(key.get('encoder_hash', 'unknown'))[:12]}"


@dataclass(slots=True)
class Cleared:
    """What `clear` did."""

    num_keys: int = 0
    num_shards: int = 0
    """Of keys that stay."""
    num_bytes: int = 0
    num_hash_tables: int = 0
    """1 when the remembered hashes of audio files went too."""
    in_use: list[str] = field(default_factory=list)
    """Keys that stay because a running process uses them."""


def clear(prefix: str = "", older_than_days: float = 0.0) -> Cleared:
    """Remove features that no running process uses.

    Args:
        prefix: of the names of the keys; empty = all of them, and the table of hashes too.
        older_than_days: only shards that no run has used for so long.

    Raises:
        DataError: no key has such a name.
    """
    cleared = Cleared()
    folders = [folder for folder in key_folders() if folder.name.startswith(prefix)]
    if prefix and not folders:
        raise DataError(f"no cached features have a key that begins with {prefix!r}: see `ultravox data cache info`")
    if not features_folder().is_dir():
        return cleared
    before = time.time() - older_than_days * 86_400
    with _removing():
        cleared.num_bytes += _empty_trash()
        for folder in folders:
            _clear_key(folder, before, cleared)
    if not prefix and not older_than_days:
        cleared.num_hash_tables = int((features_folder() / HASHES_FILE).exists())
        cleared.num_bytes += Shard.num_bytes(features_folder() / HASHES_FILE)
        (features_folder() / HASHES_FILE).unlink(missing_ok=True)
    return cleared


def _clear_key(folder: Path, before: float, cleared: Cleared) -> None:
    """Remove what of a key was last used before a time, and add it to what was cleared."""
    shards = find_shards(folder)
    old = [shard for shard in shards if shard.last_use() <= before]
    if len(old) == len(shards) and (shards or _last_use(folder) <= before):
        freed = remove_key(folder)
        cleared.num_keys += freed is not None
        cleared.num_bytes += freed or 0
        cleared.in_use += [folder.name] * (freed is None)
    elif old:
        with alone(folder / READERS_FILE) as free:
            cleared.num_shards += len(old) * free
            cleared.num_bytes += sum(shard.remove() for shard in old) if free else 0
            cleared.in_use += [folder.name] * (not free)


def remove_key(folder: Path) -> int | None:
    """Remove a key's folder; returns the bytes that are freed, or None where a running process uses it."""
    with alone(folder / READERS_FILE) as unread, alone(folder / LOCK_FILE) as unbuilt:
        if not (unread and unbuilt):
            return None
        freed = _size(folder)
        trash = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_TRASH))
        os.replace(folder, trash / folder.name)  # gone at once for everyone, also if this process is killed now
    shutil.rmtree(trash)
    return freed


@contextmanager
def _removing() -> Iterator[None]:
    """One at a time: two who make room at once would each remove enough for both."""
    with locked(make_folder(features_folder()) / LOCK_FILE, f"removes features in {features_folder()}"):
        yield


def _empty_trash() -> int:
    """Remove what one who was killed while removing has left; returns its bytes."""
    freed = 0
    for trash in features_folder().glob(f"{_TRASH}*"):
        freed += _size(trash)
        shutil.rmtree(trash, ignore_errors=True)
    return freed


def make_room(max_bytes: int, more: int, own: Path, held: IO, keep: Collection[int]) -> None:
    """Remove the least recently used features until `more` bytes fit below `max_bytes`.

    Args:
        max_bytes: what the folder of all features may hold.
        more: what is about to be written.
        own: folder of the key that is built now, with its lock held.
        held: what `hold` gave for it.
        keep: shards in it that are needed now. Other keys go as far as no process uses them.

    Raises:
        DataError: what is in use leaves no room.
    """
    with ExitStack() as stack:
        stack.enter_context(_removing())
        _empty_trash()
        total = features_bytes()
        candidates: list[tuple[float, Path, Shard | None]] = []
        for folder in key_folders():
            shards = find_shards(folder)
            candidates += [(s.last_use(), folder, s) for s in shards if folder != own or s.number not in keep]
            if not shards and folder != own:
                candidates.append((_last_use(folder), folder, None))
        free: dict[Path, bool] = {}
        for _, folder, shard in sorted(candidates, key=lambda candidate: candidate[:2]):
            if total + more <= max_bytes:
                return
            if shard is None:
                total -= remove_key(folder) or 0
                continue
            if folder not in free:
                context = alone_but_for(held) if folder == own else alone(folder / READERS_FILE)
                free[folder] = stack.enter_context(context)
            total -= shard.remove() if free[folder] else 0
    if total + more > max_bytes:
        raise DataError(
            f"{features_folder()} holds {total / 1e9:.3g} GB that this run or other running processes use, and "
            f"{more / 1e9:.3g} GB more are needed: raise data.max_cache_gb = {max_bytes / 1e9:g} above "
            f"{(total + more) / 1e9:.3g} (null = no limit), or wait until the others have ended"
        )


def _last_use(folder: Path) -> float:
    """Of a folder without shards, which may be one of format version 1."""
    index = folder / _OLD_INDEX
    return (index if index.is_file() else folder).stat().st_mtime


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, but for the few that a lock says its holder in."""
    files = (Path(place) / name for place, _, names in os.walk(folder) for name in names if name != LOCK_FILE)
    return sum(map(Shard.num_bytes, files))
