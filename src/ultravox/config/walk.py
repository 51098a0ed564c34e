"""Walks over the schema: every key with its type, default and meaning, and the keys that a section knows."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ultravox.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key of the configuration, as the docs and ``--help`` show it."""

    path: str  # dotted; "stages[].optim.lr.projector"
    type: str
    default: str  # as YAML; "required" where there is none
    description: str
    is_section: bool


def describe_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[KeyInfo]:
    """Every key in the order of the schema, sections before what they hold."""
    return list(_describe(model, prefix, model.model_fields))


def field_names_at(path: Sequence[str | int], model: type[BaseModel] = RunConfig) -> list[str] | None:
    """The keys known in the section at ``path`` (("stages", 0, "optim")), or None where no section is."""
    section: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue  # a list of sections: the field before it gave the item's class
        if section is None or part not in section.model_fields:
            return None
        section = _section_of(section.model_fields[part].annotation)
    return None if section is None else list(section.model_fields)


def field_at(path: Sequence[str | int], model: type[BaseModel] = RunConfig) -> tuple[Any, Sequence[Any]] | None:
    """The type of the value at ``path`` (("data", "speeds", 0)) and its limits, or None where the schema has none."""
    found: tuple[Any, Sequence[Any]] | None = (model, ())
    for part in path:
        found = None if found is None else _inside(found[0], part)
    return found


def _inside(annotation: Any, part: str | int) -> tuple[Any, Sequence[Any]] | None:
    annotation, _ = bare_annotation(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return next((found for one in arguments if (found := _inside(one, part)) is not None), None)
    if isinstance(part, int):
        place = part if origin is tuple else 0
        return (arguments[place], ()) if origin in (list, tuple) and place < len(arguments) else None
    if origin is dict:
        return arguments[1], ()
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and part in annotation.model_fields:
        info = annotation.model_fields[part]
        return info.annotation, info.metadata
    return None


def default_of(path: Sequence[str | int]) -> str | None:
    """The default of a key as YAML, or None where there is none."""
    section = (field_at(path[:-1]) or (None,))[0] if path else None
    if not (isinstance(section, type) and issubclass(section, BaseModel) and path[-1] in section.model_fields):
        return None
    default = _default(section.model_fields[str(path[-1])])
    return None if default == "required" else default


def bare_annotation(annotation: Any, metadata: Sequence[Any] = ()) -> tuple[Any, list[Any]]:
    """A type without its ``Annotated``, and the limits that stood there beside those already known."""
    if not hasattr(annotation, "__metadata__"):
        return annotation, list(metadata)
    inner = [limit for part in annotation.__metadata__ for limit in getattr(part, "metadata", [part])]
    return annotation.__origin__, [*inner, *metadata]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class that a field holds: itself, or the item of its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is list:
        return _section_of(get_args(annotation)[0])
    return None


def _describe(model: type[BaseModel], prefix: str, fields: dict[str, FieldInfo]) -> Iterator[KeyInfo]:
    for name, info in fields.items():
        path = f"{prefix}{name}"
        section = _section_of(info.annotation)
        if section is None:
            yield KeyInfo(
                path, _type_name(info.annotation, info.metadata), _default(info), info.description or "", False
            )
            continue
        is_list = get_origin(info.annotation) is list
        required = "required" if info.is_required() else ""
        yield KeyInfo(
            f"{path}[]" if is_list else path, "list" if is_list else "section", required, info.description or "", True
        )
        # a section's defaults may differ from its class's: show those of this place
        yield from _describe(section, f"{path}[]." if is_list else f"{path}.", section.model_fields)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.json_schema_extra, dict) and "default" in info.json_schema_extra:
        return str(info.json_schema_extra["default"])  # one that depends on more than the schema
    value = info.get_default(call_default_factory=True, validated_data={})
    return "required" if value is PydanticUndefined else _as_yaml(value)


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    return str(value)


def _type_name(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin = get_origin(annotation)
    if origin is dict:
        return " → ".join(map(_type_name, get_args(annotation)))
    if origin is Literal:
        return " or ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(
            _type_name(part, metadata if part is not type(None) else ()) for part in get_args(annotation)
        )
    if origin is list:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if origin is tuple:
        return f"{len(get_args(annotation))} × {_type_name(get_args(annotation)[0])}"
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _type_name(*bare_annotation(annotation))
    if annotation is type(None):
        return "null"
    name = {int: "integer", float: "number", str: "text", bool: "true or false"}.get(annotation, str(annotation))
    return f"{name}{value_range(metadata)}" if annotation in (int, float) else name


def value_range(metadata: Sequence[Any]) -> str:
    """The limits of a number, after a space: " ≥ 0, < 1"; nothing where there are none."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    parts = [f"{sign} {getattr(item, key)}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    parts += [f"a multiple of {item.multiple_of}" for item in metadata if hasattr(item, "multiple_of")]
    return f" {', '.join(parts)}" if parts else ""
