"""Frozen config dataclasses from plain mappings, strictly.

The dataclass lives beside the code that it configures; configs/ holds the ml_collections files. `build` refuses
unknown keys (suggesting the nearest) and wrong types by name, so that a typo can't be silently ignored.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from magic141_jax.errors import UserError, nearest

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], *, where: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a mapping, nested dataclasses included.

    Args:
      cls: a dataclass type whose fields are bool, int, float, str, tuples, `X | None`, dicts or dataclasses.
      values: the mapping, an ml_collections ConfigDict included. Missing keys take the field's default.
      where: dotted prefix used in messages.

    Raises:
      UserError: unknown key, wrong type, or a missing key without default; all named by their dotted path.
    """
    as_dict = getattr(values, "to_dict", None)  # a ConfigDict is no Mapping
    values = values if as_dict is None else as_dict()
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"unknown key {where}.{key}.{nearest(key, fields)}")
        made[key] = _coerce(hints[key], value, f"{where}.{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise UserError(f"missing key {where}.{name} (a {_type_name(hints[name])})")
    try:
        return cls(**made)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `build`: a JSON-ready dict of a config dataclass."""
    return dataclasses.asdict(config)


def _coerce(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as `kind`, converting only where nothing is lost (int to float, list to tuple)."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return build(kind, value, where=where)
    elif origin in (types.UnionType, typing.Union):
        return _coerce_union(kind, value, where)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            args = typing.get_args(kind)
            items = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
            if len(items) == len(value):
                return tuple(_coerce(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(items, value, strict=True)))
    elif origin is typing.Literal:
        if value in typing.get_args(kind):
            return value
        raise UserError(f"{where} is {value!r}.{nearest(str(value), typing.get_args(kind))}")
    elif kind is Any:
        return value
    elif origin is dict or kind is dict:
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, kind):
        return value
    raise UserError(f"{where} must be {_type_name(kind)}, got {value!r} ({type(value).__name__})")


def _coerce_union(kind: Any, value: Any, where: str) -> Any:
    options = typing.get_args(kind)
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(option, value, where)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind).replace("typing.", "")
