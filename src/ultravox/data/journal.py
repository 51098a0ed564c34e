"""Finished parts of a long piece of work, so that a run that was killed goes on where it was.

A journal is a JSON-lines file beside the work. Its first line holds the format version and the settings; each further
line is one finished part. A line that a kill cut short is dropped, and its part is done again. Where nothing was
finished and nothing else lies in the folder, the settings bind nobody.
"""

import fcntl
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultravox.errors import DataError
from ultravox.files import explain_full_disk, make_folder, making

FORMAT_VERSION = 1
MOST_SHOWN = 80  # characters of a setting in a message


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
        self._made = [folder for folder in path.parents if not folder.exists()]
        make_folder(path.parent)
        with making(path):
            self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except OSError:
            mine = False
        if not mine:
            self._file.close()
            raise DataError(f"{path.parent} is being made by another process: wait for it, or stop it")
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
            return self._begin(settings)
        try:
            head, *rows = [json.loads(line) for line in whole.splitlines()]
            version, kept = head["version"], head.get("settings", {})
            parts = {(row["kind"], row["part"]): row["value"] for row in rows} if version == FORMAT_VERSION else {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{self.path} is not a journal ({error}): remove it to begin anew") from error
        if version != FORMAT_VERSION:
            raise DataError(f"{self.path} has format version {version!r}, this program reads {FORMAT_VERSION}")
        difference = first_difference(kept, settings)
        if difference and not parts and self._is_alone():
            self._file.truncate(0)
            return self._begin(settings)
        if difference:
            raise DataError(
                f"{self.path.parent} was begun with {difference}: use that again, choose another place, or --overwrite "
                "it"
            )
        self._parts = parts
        return None

    def _begin(self, settings: dict[str, Any]) -> None:
        try:
            self._append({"version": FORMAT_VERSION, "settings": settings})
        except BaseException:
            self.close()
            raise

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
        """Let another process have it. A journal of work that never began goes, with the folders made for it."""
        if not self._parts and self.path.exists() and self._is_alone():
            self.path.unlink()
            with suppress(OSError):  # others may use them by now
                for folder in self._made:
                    folder.rmdir()
        self._file.close()

    def _is_alone(self) -> bool:
        return [path for path in self.path.parent.iterdir() if path != self.path] == []


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The first setting of two that differs, as "seed 0 (now 1)"; empty when all agree.

    It leads into objects and lists: "voices 2 engine_version 1.0 (now 1.1)". Of a file that is known by its hash, it
    says that the content differs.
    """
    for key in [*old, *new]:
        if old.get(key) != new.get(key):
            if key == "sha256":
                return f"another content of {old.get('file', 'the file')} (it has changed since)"
            return _difference(key, old.get(key), new.get(key))
    return ""


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inside = first_difference(old, new)
        return inside if inside.startswith("another content of ") else f"{name} {inside}"
    if _is_list(old) and _is_list(new) and len(old) == len(new) and not all(map(_is_plain, [*old, *new])):
        index = next(index for index, (one, other) in enumerate(zip(old, new, strict=True)) if one != other)
        return _difference(f"{name} {index + 1}", old[index], new[index])
    if isinstance(old, str) and isinstance(new, str):
        pairs = enumerate(zip(old, new, strict=False))
        same = next((place for place, (one, other) in pairs if one != other), min(len(old), len(new)))
        if same > MOST_SHOWN // 2:  # two long texts that begin alike
            old, new = f"…{old[same - 10 :]}", f"…{new[same - 10 :]}"
    return f"{name} {_shown(old)} (now {_shown(new)})"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_plain(value: Any) -> bool:
    """Whether a value is short enough to stand in a list."""
    return isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= MOST_SHOWN // 2)


def _shown(value: Any) -> str:
    """A setting as it was given, or what kind of thing it is where that would be too long."""
    if value is None or value == "" or value == []:
        return "none"
    if _is_list(value) and all(map(_is_plain, value)):
        text = ", ".join(map(str, value))
        return text if len(text) <= MOST_SHOWN else f"of {len(value)} entries"
    if _is_list(value):
        return f"of {len(value)} entries"
    if isinstance(value, Mapping):
        return f"with {', '.join(map(str, value))}"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"
