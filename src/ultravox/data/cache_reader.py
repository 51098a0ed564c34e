"""Cached features of one key as a reader sees them: the entries of all its shards, and views of their rows."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ultravox.data.cache_folder import features_folder, hold, read_key_file
from ultravox.data.cache_shards import (
    ENTRY,
    FORMAT_VERSION,
    SHARD_BYTES,
    Shard,
    find_shards,
    hash_name,
    index_states,
    is_whole,
)
from ultravox.errors import DataError


@dataclass(frozen=True, slots=True)
class CacheKey:
    """All that decides the cached numbers, apart from the audio itself."""

    encoder_hash: str
    preprocessing: str
    num_channels: int
    dtype: str = "float16"

    @property
    def id(self) -> str:
        """32 hex digits, the folder's name."""
        text = json.dumps({"format": FORMAT_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def folder(self) -> Path:
        return features_folder() / self.id

    @property
    def row_bytes(self) -> int:
        """Bytes of one frame."""
        return self.num_channels * np.dtype(self.dtype).itemsize


class CachedFeatures:
    """Read the features of one key. Frames come back as views of the memory-mapped file, without a copy.

    What is on disk is opened on first use, and kept from removal until the object goes. It can be pickled, and used in
    forked processes: another process opens the files for itself.

    Args:
        key: all that decides the numbers.
        encoder: a name for people, who see it in `ultravox data cache info`.
        shard_bytes: files are closed before they grow beyond this.

    Raises:
        DataError (on first use): the folder says that it holds something else.
    """

    def __init__(self, key: CacheKey, encoder: str = "", shard_bytes: int = SHARD_BYTES) -> None:
        self.key, self.encoder, self.shard_bytes = key, encoder, shard_bytes
        self.folder = key.folder()
        self.held: IO | None = None
        self._shards: list[Shard] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("key", "encoder", "shard_bytes", "folder")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["key"], state["encoder"], state["shard_bytes"])  # type: ignore[misc]
        self.folder = state["folder"]

    def __contains__(self, name: str) -> bool:
        return bool(self._find([name])[0] >= 0)

    def num_frames(self, name: str) -> int:
        place = self._place(name)
        return int(self._entries["rows"][place])

    def frames(self, name: str) -> np.ndarray:
        """Frames of an entry, [frame, channel], read-only view of the file.

        The first time they are checked: the file may have gone bad without a trace. DataError if so.
        """
        place = self._place(name)
        shard, entry = int(self._shard_of[place]), self._entries[place].item()
        rows = self._rows[shard]
        if rows is None:
            rows = self._rows[shard] = self._open_shards()[shard].rows(self.key.dtype, self.key.num_channels)
        if not self._checked[place]:
            if not is_whole(rows, entry):
                broken = self._open_shards()[shard]
                with suppress(OSError):  # a read-only disk
                    broken.set_verified(False)
                raise DataError(f"cached features in {broken.data} are damaged: start again, and they are made again")
            self._checked[place] = True
        return rows[entry[1] : entry[1] + entry[2]]

    def _open(self, make: bool = False) -> None:
        """Read the indexes. `make` = make the folder if it is absent."""
        self._shards = []
        self._indexes = index_states(self.folder)  # before they are read: what changes meanwhile is read again
        tables, numbers = [np.zeros(0, ENTRY)], [np.zeros(0, np.int32)]
        if make or self.folder.is_dir():
            self.held = self.held or hold(self.folder)
            self._check_key_file()
            for shard in find_shards(self.folder):
                if (entries := shard.entries(self.key.id)) is not None:
                    there = Shard.num_bytes(shard.data) // self.key.row_bytes  # a truncated copy has less
                    entries = entries[entries["start"].astype(np.int64) + entries["rows"] <= there]
                    tables.append(entries)
                    numbers.append(np.full(len(entries), len(self._shards), np.int32))
                    self._shards.append(shard)
        table = np.concatenate(tables)
        order = np.argsort(table["name"], kind="stable")
        self._entries = table[order]
        self._names = np.ascontiguousarray(self._entries["name"])
        self._shard_of = np.concatenate(numbers)[order]
        self._checked = np.zeros(len(order), bool)
        self._rows: list[np.ndarray | None] = [None] * len(self._shards)

    def _open_shards(self) -> list[Shard]:
        """The shards; opens them where that is not done."""
        if self._shards is None:
            self._open()
        return self._shards or []

    def _check_key_file(self) -> None:
        said = read_key_file(self.folder)
        if said is not None and (said.get("version"), said.get("key")) != (FORMAT_VERSION, asdict(self.key)):
            raise DataError(
                f"{self.folder} holds features of another key, or of format version {said.get('version')} instead of "
                f"{FORMAT_VERSION}: remove it with `ultravox data cache clear --key {self.key.id}`"
            )

    def _find(self, names: Sequence[str]) -> np.ndarray:
        """Place of each name among the entries, int64 [name]; −1 = absent."""
        self._open_shards()
        if not names or not len(self._names):
            return np.full(len(names), -1)
        wanted = np.array([hash_name(name) for name in names], "S16")
        places = np.searchsorted(self._names, wanted, side="right") - 1  # the newest, should there be two
        return np.where(self._names[places] == wanted, places, -1)

    def _place(self, name: str) -> int:
        if (place := int(self._find([name])[0])) < 0:
            raise KeyError(name)
        return place

    def _is_complete(self, names: Sequence[str]) -> bool:
        """Whether all entries are there and whole.

        Another process may have mended a shard, and called it verified, after its index was read here. Such an answer
        is of another index, so it is asked anew.
        """
        while True:
            places = self._find(names)
            used = np.unique(self._shard_of[places[places >= 0]]).tolist()
            complete = bool((places >= 0).all()) and not self._find_damaged(used)
            if not complete or self._indexes == index_states(self.folder):
                return complete
            self._open()

    def _find_damaged(self, indexes: list[int]) -> list[tuple[Shard, np.ndarray]]:
        """Those of some shards that are damaged, and which of the entries in their index are whole, bool [entry].

        A shard is read only when it has changed since it was last found to be whole.
        """

        def look(shard: Shard) -> np.ndarray | None:
            if shard.is_verified() or (entries := shard.entries(self.key.id)) is None:
                return None
            whole = shard.whole(entries, self.key.dtype, self.key.num_channels)
            if whole.all() and os.access(self.folder, os.W_OK):
                shard.set_verified()
            return None if whole.all() else whole

        shards = [self._open_shards()[index] for index in indexes]
        with ThreadPoolExecutor() as pool:  # the CRC is computed outside of Python's lock
            found = list(pool.map(look, shards))
        return [(shard, whole) for shard, whole in zip(shards, found, strict=True) if whole is not None]
