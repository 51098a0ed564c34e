"""From a YAML file and command-line overrides to a checked RunConfig, with errors that name file and line."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ultravox.config.schema import RunConfig
from ultravox.config.walk import KeyInfo, describe_keys, field_names_at
from ultravox.errors import ConfigError

__all__ = ["KeyInfo", "describe_keys", "dump_config", "load_config", "parse_config"]

KeyPath = tuple[str | int, ...]
COMMAND_LINE = "command line"


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


@dataclass
class _Document:
    """Raw keys and where each came from ("file:line" or the command line)."""

    data: dict[str, Any]
    origin: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """The nearest known origin of a key, its own or its section's."""
        while path and path not in self.origin:
            path = path[:-1]
        return self.origin.get(path, "config")


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
    if ("run_dir",) not in document.origin or not document.origin["run_dir",].startswith(f"{path}:"):
        # never inherited: a refined run must not write into its parent's folder
        document.data["run_dir"] = f"runs/{path.stem}"
    _apply_overrides(document, overrides)
    return _validate(document, str(path))


def parse_config(text: str, name: str = "config") -> RunConfig:
    """Check a configuration given as YAML text, such as one saved in a checkpoint (no ``extends:``)."""
    return _validate(_parse(text, name))


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; loading it gives an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


# Reading


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> _Document:
    resolved = path.resolve()
    if resolved in children:
        chain = " → ".join(p.name for p in (*children, resolved))
        raise ConfigError(f"{path}: 'extends' goes in a circle ({chain}); remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file{_suggest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from None
    document = _parse(text, str(path))
    parent = document.data.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise ConfigError(f"{document.where(('extends',))}: 'extends' takes one file name, got {parent!r}")
    return _merge(_read_with_parents(path.parent / parent, (*children, resolved)), document)


def _suggest_file(path: Path) -> str:
    here = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, here, n=1) or difflib.get_close_matches(f"{path.name}.yaml", here, n=1)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def _parse(text: str, name: str) -> _Document:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        document = _Document({})
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
                raise ConfigError(f"{place}: key '{_dotted((*path, key))}' was already given in line {first}; keep one")
            origin[*path, key] = place
            mapping[key] = _construct(loader, value_node, (*path, key), origin, name, inside)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, child, (*path, index), origin, name, inside) for index, child in enumerate(node.value)
        ]
    return loader.construct_object(node)


# Merging


def _merge(parent: _Document, child: _Document) -> _Document:
    merged = _Document({}, dict(parent.origin))
    merged.data = _merge_values(parent.data, child.data, (), (), child.origin, merged.origin)
    return merged


def _merge_values(
    old: Any, new: Any, path: KeyPath, new_path: KeyPath, new_origin: dict[KeyPath, str], origin: dict[KeyPath, str]
) -> Any:
    """Mappings merge key by key, `stages` by stage name, anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        result = dict(old)
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


def _apply_overrides(document: _Document, overrides: Sequence[str]) -> None:
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
        _raise_unknown(COMMAND_LINE, first, (), names)


def _set(document: _Document, key: str, value: Any) -> None:
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
                _raise_unknown(COMMAND_LINE, part, path, names)
        else:
            raise ConfigError(f"{COMMAND_LINE}: --{key}: {_dotted(path)} is a value ({here!r}), not a section")
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
    raise ConfigError(f"{COMMAND_LINE}: nothing named {part!r} in {_dotted(path)} ({holds}){_hint(part, known)}")


# Checking


def _validate(document: _Document, file: str = "") -> RunConfig:
    try:
        return RunConfig.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    # an unknown key explains the missing one beside it, so it goes first
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    path: KeyPath = tuple(first["loc"])
    where = document.where(path)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        _raise_unknown(where, str(path[-1]), path[:-1], field_names_at(path[:-1]) or [], more)
    if first["type"] == "missing":
        place = f" in {_dotted(path[:-1])}" if path[:-1] else ""
        raise ConfigError(f"{where}: key '{path[-1]}' is missing{place}{more}")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "should")
    if first["type"] == "value_error":
        where = document.where(_blamed(document, path, message, file))
    message = (
        message.replace("greater than or equal to", "be ≥")
        .replace("less than or equal to", "be ≤")
        .replace("be be", "be")
    )
    given = "" if first["type"] == "value_error" else f", got {_short(first['input'])}"
    raise ConfigError(f"{where}: {_dotted(path) + ': ' if path else ''}{message}{given}{more}")


def _blamed(document: _Document, section: KeyPath, message: str, file: str) -> KeyPath:
    """Of the keys that a section's error names, one from the command line, else from the run's own file, else any."""
    said = set(re.findall(r"[\w.]+", re.sub(r"'[^']*'", "", message)))
    hinted = {part for word in re.findall(r"[\w.]+", message) for part in word.split(".")}
    named: list[KeyPath] = []
    for key, place in document.origin.items():
        inside = key[len(section) :]
        if key[: len(section)] != section or not inside:
            continue
        if place.startswith(COMMAND_LINE) and hinted & set(map(str, inside)):
            return key
        if _dotted(inside) in said and (section or message.startswith(f"{_dotted(inside)} ")):
            named.append(key)
    own = [key for key in named if document.origin[key].startswith(f"{file}:")]
    return next(iter(own or named), section)


def _raise_unknown(where: str, key: str, section: KeyPath, names: list[str], more: str = "") -> None:
    place = f" in {_dotted(section)}" if section else ""
    raise ConfigError(f"{where}: unknown key '{key}'{place}{_hint(key, names)}{more}")


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(known)}" if known else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
