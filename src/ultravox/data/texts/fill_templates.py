"""Texts from Jinja templates and lists of values: every combination, or a sample of them."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ultravox.data.journal import Journal
from ultravox.data.texts.items import SpokenText, digest, own_columns
from ultravox.errors import DataError

Values = Mapping[str, Sequence[Any]]
MAX_COMBINATIONS = 1_000_000  # in a list or a shuffle; more are drawn one by one
RESERVED = ("id", "text", "answer", "language", "licence")


def read_values(path: Path) -> dict[str, list[Any]]:
    """A YAML file of lists: name → entries. DataError when it is something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the values {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected names with lists of values, got {type(content).__name__}")
    for name, entries in content.items():
        if not isinstance(name, str) or not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: {name!r} must be a list with values, got {entries!r}")
        if name in RESERVED:
            raise DataError(f"{path}: {name!r} is a column of every row already: give the list another name")
    return json.loads(json.dumps(content, default=str))  # dates, too, as the file spells them


@dataclass(frozen=True)
class TemplateTexts:
    """Sandboxed Jinja templates over lists of values; the values of a text become its columns.

    Args:
        templates: they take turns.
        values: entries of each name.
        sample: draw combinations in random order; else they come in the order of the lists, the last one fastest.
        seed: of that draw.

    Raises:
        DataError: a template that cannot be read, or that names a list that is not there.
    """

    templates: Sequence[str]
    values: Values
    sample: bool = False
    seed: int = 0
    costly = False

    def __post_init__(self) -> None:
        _ = self._compiled  # so that a mistake is found at once

    def settings(self) -> dict[str, Any]:
        """See ``TextSource``."""
        used = sorted({name for _, names in self._compiled for name in names})
        values = {name: list(self.values[name]) for name in used}
        return {"templates": list(self.templates), "values": values, "sample": self.sample, "seed": self.seed}

    @cached_property
    def _compiled(self) -> list[tuple[Any, list[str]]]:
        """Each template with the names of its lists."""
        from jinja2 import StrictUndefined, TemplateError, meta
        from jinja2.sandbox import SandboxedEnvironment

        environment = SandboxedEnvironment(undefined=StrictUndefined)
        compiled = []
        for template in self.templates:
            try:
                names = sorted(meta.find_undeclared_variables(environment.parse(template)) - set(environment.globals))
                compiled.append((environment.from_string(template), names))
            except TemplateError as error:
                raise DataError(f"the template {template!r} cannot be read: {error}") from error
            if missing := [name for name in names if name not in self.values]:
                known = ", ".join(self.values) or "none"
                raise DataError(f"the template {template!r} names {missing[0]!r}, but the values are: {known}")
        return compiled

    def texts(self, journal: Journal | None = None) -> Iterator[SpokenText]:
        """See ``TextSource``."""
        generator = random.Random(self.seed)
        streams = [
            self._texts_of(template, compiled, names, generator)
            for template, (compiled, names) in zip(self.templates, self._compiled, strict=True)
        ]
        while streams:
            for stream in list(streams):
                if (text := next(stream, None)) is None:
                    streams.remove(stream)
                else:
                    yield text

    def _texts_of(
        self, template: str, compiled: Any, names: Sequence[str], generator: random.Random
    ) -> Iterator[SpokenText]:
        lists = [self.values[name] for name in names]
        for combination in self._combinations(lists, generator):
            values = dict(zip(names, combination, strict=True))
            try:
                text = compiled.render(values)
            except Exception as error:  # what a template runs into is as wide as Python
                raise DataError(f"the template {template!r} fails for {values}: {error}") from error
            yield SpokenText(text, f"template:{digest(template)}", columns=own_columns(values))

    def _combinations(self, lists: Sequence[Sequence[Any]], generator: random.Random) -> Iterator[Sequence[Any]]:
        total = math.prod(map(len, lists))
        if not self.sample:
            if total > MAX_COMBINATIONS:
                raise DataError(f"the lists have {total} combinations: give --num-texts, so that some are drawn")
            yield from itertools.product(*lists)
        elif total <= MAX_COMBINATIONS:
            for number in generator.sample(range(total), total):
                yield _combination(lists, number)
        else:
            seen: set[int] = set()
            while len(seen) < MAX_COMBINATIONS:
                if (number := generator.randrange(total)) not in seen:
                    seen.add(number)
                    yield _combination(lists, number)


def _combination(lists: Sequence[Sequence[Any]], number: int) -> list[Any]:
    """The number-th of all combinations, as ``itertools.product`` counts them."""
    entries = []
    for entries_of_one in reversed(lists):
        number, index = divmod(number, len(entries_of_one))
        entries.append(entries_of_one[index])
    return entries[::-1]
