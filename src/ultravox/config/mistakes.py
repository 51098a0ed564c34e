"""Mistakes in a configuration in words: where each stands, what was expected, what came, and what to change."""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from ultravox.config.document import COMMAND_LINE, Document, KeyPath, value_in
from ultravox.config.section import MISFIT, TruthValue
from ultravox.config.walk import bare_annotation, default_of, field_at, field_names_at, value_range
from ultravox.errors import ConfigError

MOST_MISTAKES = 10
#: What is asked for by name and is no longer made anywhere, and what to take instead.
RETIRED = {
    r"nebula": (
        "Nebula has been ended by Microsoft, and DeepSpeed refuses it: take `checkpoints`, which are written beside "
        "training (background), kept in tiers (keep_last, keep_every, keep_best) and copied to a store (upload)"
    ),
    r"ort_?module|torch_?ort|^ort$|onnx_?runtime|ort_?training": (
        "ONNX Runtime training (ORTModule, torch-ort) was ended in 2024: leave it out. torch.compile makes training "
        "faster; ONNX Runtime itself is for inference, of an ONNX export"
    ),
}
#: What a text has to look like, for the patterns of the schema.
FORMS = {r"^[a-z][a-z0-9_]*$": "a name of lower-case letters, digits and _ that begins with a letter"}
PLURALS = {"a text": "texts", "an integer": "integers", "a number": "numbers", "true or false": "truth values"}


def explain(details: Sequence[Mapping[str, Any]], document: Document) -> ConfigError:
    """All mistakes that pydantic found, a line each, in the order of the schema; unknown keys first.

    An unknown key explains the missing one beside it. More than `MOST_MISTAKES` are counted.
    """
    lines = [_line(detail, path, document) for detail, path in _different(details, document)]
    more = len(lines) - MOST_MISTAKES
    return ConfigError(*lines[:MOST_MISTAKES], *([f"and {more} more"] if more > 0 else []))


def unknown_key(where: str, key: str, section: str, known: Sequence[str]) -> str:
    """The line about a key that a section ("" = the top level) does not know."""
    place = f" in {section}" if section else ""
    return f"{where}: unknown key '{key}'{place}{retired(key) or hint(key, known)}"


def retired(word: object) -> str:
    """What to take instead of what is no longer made, if a key or value names that."""
    found = [text for pattern, text in RETIRED.items() if re.search(pattern, str(word).lower())]
    return f": {found[0]}" if found else ""


def hint(word: str, known: Sequence[str]) -> str:
    """What was probably meant, or what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(known)}" if known else ""


def _different(details: Sequence[Mapping[str, Any]], document: Document) -> Iterable[tuple[Mapping[str, Any], KeyPath]]:
    """Each mistake once, with its key: pydantic names one for each branch of a union."""
    found = [(detail, *_key_path(detail, document)) for detail in details]
    found.sort(key=lambda one: one[0]["type"] != "extra_forbidden")
    seen = set()
    for detail, path, in_branch in found:
        deeper = any(other[: len(path)] == path and len(other) > len(path) for _, other, _ in found)
        if path not in seen and not (in_branch and deeper):  # of a list, an item that is wrong says more
            seen.add(path)
            yield detail, path


def _key_path(detail: Mapping[str, Any], document: Document) -> tuple[KeyPath, bool]:
    """The key that a mistake is about, and whether pydantic had put more into its place, as the branch of a union."""
    location = tuple(detail["loc"])
    is_absent = detail["type"] == "missing" and not isinstance(location[-1], int)
    inside = location[:-1] if is_absent else location
    path: KeyPath = ()
    here: Any = document.data
    for part in inside:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            if isinstance(here, list) and part >= len(here):
                continue  # a list that is too short: it is the list that is wrong
            path, here = (*path, part), value_in(here, part)
    return ((*path, location[-1]) if is_absent else path), len(path) < len(inside)


def _line(detail: Mapping[str, Any], path: KeyPath, document: Document) -> str:
    where, kind = document.where(path), detail["type"]
    if kind == "extra_forbidden":
        section = path[:-1]
        return unknown_key(where, str(path[-1]), document.dotted(section), field_names_at(section) or [])
    if kind == "missing" and not isinstance(detail["loc"][-1], int):
        return f"{where}: {_missing(path, document)}"
    name = document.dotted(path)
    prefix = f"{name}: " if name and where != f"{COMMAND_LINE}: --{name}" else ""
    if kind == MISFIT:
        keys = [(*path, *_parts(key)) for key in detail["ctx"]["keys"]]
        return f"{document.where_changed(keys, path)}: {prefix}{detail['ctx']['message']}"
    if detail["loc"][-1:] == ("[key]",):
        return f"{where}: {document.dotted(path[:-1])}: expected a name as each key, got {_shown(path[-1])}"
    if (known := field_at(path)) is None:
        return f"{where}: {prefix}{detail['msg']}, got {_shown(detail['input'])}"
    annotation, metadata = bare_annotation(*known)
    given = document.data if not path else _given(document, path, detail["input"])
    wanted = _expected(annotation, metadata, given)
    if kind == "finite_number":
        wanted = wanted.replace("a number", "a finite number")
    instead = retired(given) or _remedy(annotation, path, given)
    return f"{where}: {prefix}expected {wanted}, got {_shown(given)}{instead}"


def _parts(key: str) -> KeyPath:
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _given(document: Document, path: KeyPath, otherwise: Any) -> Any:
    """What stands under a key, rather than what pydantic looked at: one item of a pair, a truth value's stand-in."""
    here: Any = document.data
    for part in path:
        here = value_in(here, part)
    return otherwise if here is None else here


def _missing(path: KeyPath, document: Document) -> str:
    section = path[:-1]
    place = f" in {document.dotted(section)}" if section else ""
    known = field_at(path)
    wanted = f": add it, {_expected(*bare_annotation(*known))}" if known else ""
    items: Any = document.data
    for part in section[:-1]:
        items = value_in(items, part)
    mine = value_in(value_in(items, section[-1]), "name") if section else None
    others = [value_in(item, "name") for item in items] if isinstance(items, list) else []
    close = difflib.get_close_matches(str(mine), [str(name) for name in others if name not in (None, mine)], n=1)
    meant = f"; did you mean to change {close[0]!r}, which is there?" if close else ""
    return f"key '{path[-1]}' is missing{place}{wanted}{meant}"


# What was expected


def _expected(annotation: Any, metadata: Sequence[Any] = (), given: Any = None) -> str:
    """A type in words, with its range: "an integer ≥ 0"."""
    annotation, metadata = bare_annotation(annotation, metadata)
    origin = get_origin(annotation)
    if origin is Literal:
        return _either([repr(value) for value in get_args(annotation)])
    if origin in (Union, types.UnionType):
        parts = [bare_annotation(part)[0] for part in get_args(annotation)]
        words = [repr(choice) for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        others = [part for part in get_args(annotation) if get_origin(bare_annotation(part)[0]) is not Literal]
        return _either([*words, *(_expected(part, metadata, given) for part in others)])
    if origin is list:
        filled = "that is not empty, of" if given == [] else "of"
        return f"a list {filled} {_plural(get_args(annotation)[0])}"
    if origin is tuple:
        return f"a list of {len(get_args(annotation))} {_plural(get_args(annotation)[0])}"
    if origin is dict:
        return f"a section of keys, each with {_expected(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a section of keys ({_some_keys(annotation)})"
    if annotation is str:
        pattern = next((item.pattern for item in metadata if getattr(item, "pattern", None)), "")
        return FORMS.get(pattern) or ("a text that is not empty" if given == "" else "a text")
    names = {int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    limits = value_range(metadata) if annotation in (int, float) else ""
    return f"{names.get(annotation, str(annotation))}{limits}"


def _plural(annotation: Any) -> str:
    inner, metadata = bare_annotation(annotation)
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        return f"sections of keys ({_some_keys(inner)})"
    one = _expected(inner, metadata)
    return next((one.replace(single, many, 1) for single, many in PLURALS.items() if one.startswith(single)), one)


def _some_keys(section: type[BaseModel]) -> str:
    needed = [name for name, field in section.model_fields.items() if field.is_required()]
    names = needed or list(section.model_fields)[:3]
    return ", ".join([*names, "…"] if len(names) < len(section.model_fields) else names)


def _either(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


# What to change


def _remedy(annotation: Any, path: KeyPath, given: Any) -> str:
    """What to write instead, where that can be said."""
    branches = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    choices = [str(c) for one in branches if get_origin(one) is Literal for c in get_args(one)]
    close = difflib.get_close_matches(given, choices, n=1) if isinstance(given, str) else []
    if close:
        return f"; did you mean '{close[0]}'?"
    if given in ("", []) or given is None:
        if path and isinstance(path[-1], int):
            return "; fill it in or take it out"
        if (default := default_of(path)) is None:
            return "; fill it in"
        return f"; without the key it is {default}" if len(default) <= 40 else "; leave the key out for its default"
    bare = [bare_annotation(one)[0] for one in branches]
    lists = [bare_annotation(get_args(one)[0])[0] for one in bare if get_origin(one) is list]
    if lists and isinstance(given, str | int | float | dict):
        item = _as_item(lists[0], given)
        fits = isinstance(item, dict) == (isinstance(lists[0], type) and issubclass(lists[0], BaseModel))
        return f"; for a list of one, write {_as_yaml([item])}" if fits else ""
    if isinstance(given, str) and isinstance(annotation, type) and (item := _as_item(annotation, given)) != given:
        return f"; write {_as_yaml(item)}"
    is_word = isinstance(given, int | float) and any(one is str for one in bare)
    return f"; write '{_shown(given)}' if it is a text" if is_word else ""


def _as_item(annotation: Any, given: Any) -> Any:
    """A value, or the section that it probably stands for: the name of a source, where one is asked for."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        needed = [name for name, field in annotation.model_fields.items() if field.is_required()]
        return {"name": given} if needed == ["name"] and isinstance(given, str) else given
    return given


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return text if len(text) <= 80 else f"{text[:77]}…"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool | TruthValue) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
