"""Finished parts of a long piece of work, so that a run that was killed goes on where it was.

A journal is a JSON-lines file beside the work. Its first line holds the format version and the settings; each further
line is one finished part. A line that a kill cut short is dropped, and its part is done again.
"""

import fcntl
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultravox.errors import DataError
from ultravox.files import explain_full_disk

FORMAT_VERSION = 1


class Journal:
    """Parts by kind and number. One process holds a journal at a time; its threads may share it.

    Args:
        path: the file, made when it is not there.
        settings: everything that decides the result, as JSON can hold it.

    Raises:
        DataError: the file belongs to other settings, to another format version, or to a process that still runs.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self._lock = path, threading.Lock()
        self._parts: dict[tuple[str, int], Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise DataError(f"{path.parent} is being made by another process: wait for it, or stop it") from None
        try:
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self._file.close()
            raise

    def _read(self, settings: dict[str, Any]) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        if not whole:
            return self._append({"version": FORMAT_VERSION, "settings": settings})
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()]
            version, kept = head["version"], head.get("settings", {})
            parts = {(row["kind"], row["part"]): row["value"] for row in rows} if version == FORMAT_VERSION else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path} is not a journal ({error}): remove it to begin anew") from error
        if version != FORMAT_VERSION:
            raise DataError(f"{self.path} has format version {version!r}, this program reads {FORMAT_VERSION}")
        if difference := first_difference(kept, settings):
            raise DataError(f"{self.path.parent} was begun with {difference}: use those again, or begin anew elsewhere")
        self._parts = parts
        return None

    def _append(self, row: dict[str, Any]) -> None:
        with explain_full_disk(self.path):
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def get(self, kind: str, part: int) -> Any | None:
        """What a finished part came to, or None."""
        return self._parts.get((kind, part))

    def add(self, kind: str, part: int, value: Any) -> None:
        """Note a finished part, on disk before this returns."""
        with self._lock:
            self._append({"kind": kind, "part": part, "value": value})
            self._parts[kind, part] = value

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting of two that differs, as "seed 0 (now 1)"; empty when all agree."""
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            return f"{key} {_short(old.get(key))} (now {_short(new.get(key))})"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"
