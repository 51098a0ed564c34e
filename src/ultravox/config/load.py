"""From a YAML file and command-line overrides to a checked RunConfig, with errors that name file and line."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ultravox.config.document import COMMAND_LINE, Document, KeyPath, dotted
from ultravox.config.mistakes import explain, hint, unknown_key
from ultravox.config.schema import RunConfig
from ultravox.config.walk import KeyInfo, describe_keys, field_names_at
from ultravox.errors import ConfigError

__all__ = ["KeyInfo", "describe_keys", "dump_config", "load_config", "parse_config"]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number, and on, off, yes and no are words (YAML 1.2; neither is so in 1.1)."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run configuration.

    Args:
        path: a YAML file; ``extends: other.yaml`` (relative to it) names one parent whose keys it refines.
        overrides: ``["--stages.tune.max_steps", "10", "--seed=3"]``; stages and sources by name or by index.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or given twice, or a value is out of range.
    """
    path = Path(path)
    document = _read_with_parents(path, ())
    own = f"{document.files[0]}:"
    if not document.origin.get(("run_dir",), "").startswith(own):
        # never inherited: a refined run must not write into its parent's folder
        document.data["run_dir"] = f"runs/{path.stem}"
    _apply_overrides(document, overrides)
    return _validate(document)


def parse_config(text: str, name: str = "config") -> RunConfig:
    """Check a configuration given as YAML text, such as one saved in a checkpoint (no ``extends:``)."""
    return _validate(_parse(text, name))


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; loading it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


# Reading


def _read_with_parents(path: Path, children: tuple[Path, ...], extended_in: str = "") -> Document:
    resolved, shown = path.resolve(), shown_path(path)
    here = f"{extended_in}: extends: " if extended_in else ""
    if resolved in children:
        chain = " → ".join(p.name for p in (*children, resolved))
        raise ConfigError(f"{shown}: 'extends' goes in a circle ({chain}); remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{here}{shown}: no such config file{_suggest_file(path, children)}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{here}{shown}: cannot be read as a text file ({reason})") from None
    document = _parse(text, shown)
    parent = document.data.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise ConfigError(f"{document.where(('extends',))}: 'extends' takes one file name, got {parent!r}")
    place = document.where(("extends",))
    return _merge(_read_with_parents(path.parent / parent, (*children, resolved), place), document)


def shown_path(path: Path) -> str:
    """A path without detours (`configs/../own.yaml` is `own.yaml`), as long as that is the same file."""
    short = Path(os.path.normpath(path))
    return str(short if short.resolve() == path.resolve() else path.resolve())


def _suggest_file(path: Path, children: tuple[Path, ...]) -> str:
    """A file of a name like that, and none of those that wanted it."""
    others = (p for p in path.parent.glob("*.yaml") if p.resolve() not in children)
    here = sorted(p.name for p in others) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, here, n=1) or difflib.get_close_matches(f"{path.name}.yaml", here, n=1)
    return f"; did you mean {shown_path(path.with_name(close[0]))!r}?" if close else ""


def _parse(text: str, name: str) -> Document:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = Document({}, files=[name])
        if node is None:
            return document
        data = _construct(loader, node, (), document.origin, name, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: a config holds keys and values, got {type(data).__name__}")
    document.data = data
    return document


def _construct(
    loader: _Loader, node: yaml.Node, path: KeyPath, origin: dict[KeyPath, str], name: str, parents: tuple[int, ...]
) -> Any:
    """Plain Python values of a node, with every key's line noted; a key given twice is refused."""
    line = f"{name}:{node.start_mark.line + 1}"
    origin.setdefault(path, line)
    if id(node) in parents:
        raise ConfigError(f"{line}: an alias that holds itself")
    inside = (*parents, id(node))
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            place = f"{name}:{key_node.start_mark.line + 1}"
            if not isinstance(key, str):
                raise ConfigError(f"{place}: a key must be a word, got {key!r}")
            if key in mapping:
                first = origin[*path, key].rpartition(":")[2]
                raise ConfigError(f"{place}: key '{dotted((*path, key))}' was already given in line {first}; keep one")
            origin[*path, key] = place
            mapping[key] = _construct(loader, value_node, (*path, key), origin, name, inside)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, child, (*path, index), origin, name, inside) for index, child in enumerate(node.value)
        ]
    return loader.construct_object(node)


# Merging


def _merge(parent: Document, child: Document) -> Document:
    merged = Document({}, dict(parent.origin), [*child.files, *parent.files])
    merged.data = _merge_values(parent.data, child.data, (), (), child.origin, merged.origin)
    return merged


def _merge_values(
    old: Any, new: Any, path: KeyPath, new_path: KeyPath, new_origin: dict[KeyPath, str], origin: dict[KeyPath, str]
) -> Any:
    """Mappings merge key by key, `stages` by stage name, anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        result = dict(old)
        origin[path] = new_origin[new_path]
        for key, value in new.items():
            if key in old:
                result[key] = _merge_values(old[key], value, (*path, key), (*new_path, key), new_origin, origin)
            else:
                _move_origins((*new_path, key), (*path, key), new_origin, origin)
                result[key] = value
        return result
    if path == ("stages",) and _all_named(old) and _all_named(new):
        result_list = list(old)
        names = [stage["name"] for stage in old]
        for index, stage in enumerate(new):
            source = (*new_path, index)
            if stage["name"] in names:
                at = names.index(stage["name"])
                result_list[at] = _merge_values(result_list[at], stage, (*path, at), source, new_origin, origin)
            else:
                _move_origins(source, (*path, len(result_list)), new_origin, origin)
                result_list.append(stage)
                names.append(stage["name"])
        return result_list
    _move_origins(new_path, path, new_origin, origin)
    return new


def _all_named(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for item in value
    )


def _move_origins(source: KeyPath, target: KeyPath, new: dict[KeyPath, str], origin: dict[KeyPath, str]) -> None:
    for key in [key for key in origin if key[: len(target)] == target]:
        del origin[key]
    for key, place in new.items():
        if key[: len(source)] == source:
            origin[(*target, *key[len(source) :])] = place


# Overrides


def _apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    queue = list(overrides)
    while queue:
        word = queue.pop(0)
        if not re.match(r"--[A-Za-z]", word):
            raise ConfigError(f"{COMMAND_LINE}: expected an override such as --stages.tune.max_steps 10, got {word!r}")
        key, equals, text = word[2:].partition("=")
        _check_first_word(key)
        if not equals:
            if not queue or re.match(r"--[A-Za-z]", queue[0]):
                raise ConfigError(f"{COMMAND_LINE}: --{key} lacks its value (write --{key} VALUE)")
            text = queue.pop(0)
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
        _set(document, key, value)


def _check_first_word(key: str) -> None:
    first, names = key.replace("-", "_").split(".")[0], field_names_at(()) or []
    if first not in names:  # said before "lacks its value": --resum is a misspelt option rather than half an override
        raise ConfigError(unknown_key(COMMAND_LINE, first, "", names))


def _set(document: Document, key: str, value: Any) -> None:
    parts = key.split(".")
    here: Any = document.data
    path: KeyPath = ()
    for position, part in enumerate(parts):
        last = position == len(parts) - 1
        if isinstance(here, list):
            step: str | int = _find_in_list(here, part, path)
            exists = True
        elif isinstance(here, dict):
            part = part.replace("-", "_")  # --run-dir as well as --run_dir; names in lists keep their dashes
            step, exists = part, part in here
            names = field_names_at(path)
            if names is not None and part not in names:
                raise ConfigError(unknown_key(COMMAND_LINE, part, document.dotted(path), names))
        else:
            raise ConfigError(f"{COMMAND_LINE}: --{key}: {document.dotted(path)} is a value ({here!r}), not a section")
        path = (*path, step)
        if last:
            here[step] = value
            for old in [p for p in document.origin if p[: len(path)] == path]:
                del document.origin[old]
            document.origin[path] = f"{COMMAND_LINE}: --{key}"
        else:
            if not exists or here[step] is None:
                here[step] = {}
            here = here[step]


def _find_in_list(items: list[Any], part: str, path: KeyPath) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [name for name in names if isinstance(name, str)]
    holds = ", ".join(known) or f"{len(items)} items"
    raise ConfigError(f"{COMMAND_LINE}: nothing named {part!r} in {dotted(path)} ({holds}){hint(part, known)}")


# Checking


def _validate(document: Document) -> RunConfig:
    try:
        return RunConfig.model_validate(document.data)
    except ValidationError as error:
        raise explain(error.errors(include_url=False), document) from None
