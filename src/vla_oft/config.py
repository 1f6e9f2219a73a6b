"""Frozen dataclasses to JSON and back, strictly: an unknown or missing field is an error that names it, never ignored.

A field whose type is a union of dataclasses, or is marked `Annotated[..., PLUGIN]` (a union that may grow), is stored with `"kind"`: the
module of a class called Config (`l1`, `diffusion`: the file name is the registry), otherwise the class name in lower case.
"""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, Union

from vla_oft_client import RobotSpec

T = TypeVar("T")
PLUGIN = "plug-in"


def to_dict(value: Any) -> Any:
    """Plain JSON types for a (nested) frozen dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _field_to_dict(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """The inverse of `to_dict`. Raises ValueError naming the field and what was expected."""
    where = where or cls.__name__
    if cls is RobotSpec:
        return typing.cast(T, RobotSpec.from_dict(values))
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise ValueError(f"{where}: unknown fields {unknown}, missing fields {missing}; written by another version?")
    return cls(**{name: _decode(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _field_to_dict(owner: Any, name: str) -> Any:
    value = getattr(owner, name)
    hint = typing.get_type_hints(type(owner), include_extras=True)[name]
    encoded = to_dict(value)
    if dataclasses.is_dataclass(value) and _is_tagged(hint):
        return {"kind": _kind(type(value)), **encoded}
    return encoded


def _kind(cls: type) -> str:
    return cls.__module__.rsplit(".", 1)[-1] if cls.__name__ == "Config" else cls.__name__.lower()


def _is_tagged(hint: Any) -> bool:
    return PLUGIN in getattr(hint, "__metadata__", ()) or len(_dataclass_choices(hint)) > 1


def _dataclass_choices(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    candidates = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return [c for c in candidates if dataclasses.is_dataclass(c)]


def _decode(hint: Any, value: Any, where: str) -> Any:
    if _is_tagged(hint) and isinstance(value, dict):
        return _decode_tagged(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _decode(args[0], value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode_any([a for a in args if a is not type(None)], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        item_types = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(item_types) != len(value):
            raise ValueError(f"{where}: expected {len(item_types)} values, got {value!r}")
        return tuple(_decode(t, v, f"{where}.{i}") for i, (t, v) in enumerate(zip(item_types, value, strict=True)))
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}: {value!r} is not one of {list(args)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ValueError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _decode_any(hints: list[Any], value: Any, where: str) -> Any:
    """The value as the first type that it fits."""
    problems = []
    for hint in hints:
        try:
            return _decode(hint, value, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("; or ".join(problems))


def _decode_tagged(hint: Any, value: dict[str, Any], where: str) -> Any:
    choices = {_kind(c): c for c in _dataclass_choices(hint)}
    kind = value.get("kind")
    if kind not in choices:
        raise ValueError(f"{where}: kind {kind!r} is unknown; known: {sorted(choices)}")
    return from_dict(choices[kind], {name: v for name, v in value.items() if name != "kind"}, where)
