"""The raw keys of a configuration, before they are checked, and the file and line that each came from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


@dataclass
class Document:
    """Raw keys and where each came from ("file:line" or the command line)."""

    data: dict[str, Any]
    origin: dict[KeyPath, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    """The run's own file, its parent, that one's parent …"""

    def where(self, path: KeyPath) -> str:
        """The nearest known origin of a key, its own or its section's."""
        while path and path not in self.origin:
            path = path[:-1]
        return self.origin.get(path, "config")

    def where_changed(self, keys: Iterable[KeyPath], section: KeyPath) -> str:
        """The place to change, of keys of a section that do not go together.

        A key from the command line goes before one from the run's own file, and that before an inherited one.
        """
        given = [place for key in keys for path, place in self.origin.items() if path[: len(key)] == key]
        return min(given, key=self._distance, default=self.where(section))

    def _distance(self, place: str) -> int:
        if place.startswith(COMMAND_LINE):
            return -1
        file = place.rpartition(":")[0]
        return self.files.index(file) if file in self.files else len(self.files)

    def dotted(self, path: KeyPath) -> str:
        """A key as the command line takes it: items of a list by their names, where these tell them apart."""
        text, here = "", self.data
        for part in path:
            named = _name_in(here, part) if isinstance(part, int) else part
            text += f"[{part}]" if named is None else f".{named}" if text else str(named)
            here = value_in(here, part)
        return text


def dotted(path: KeyPath) -> str:
    """A key with the numbers of items, counted from 0."""
    return Document({}).dotted(path)


def value_in(value: Any, part: str | int) -> Any:
    """What a section or a list holds under a key or a number; None where it holds nothing there."""
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def _name_in(items: Any, index: int) -> str | None:
    names = [value_in(item, "name") for item in items] if isinstance(items, list) else []
    name = names[index] if index < len(names) else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) and names.count(name) == 1 else None
