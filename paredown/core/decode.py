"""What was read from JSON -> dataclasses, each field checked; what does not fit is named."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from paredown.core.settings import described

_PLAIN = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def decoded(kind: Any, value: Any, where: str = "") -> Any:
    """A value of JSON as a type: a dataclass, a list or dict of them, or a plain one.

    Args:
        where: the field that it stands in, "" for all of it.

    Raises:
        ValueError: a field is missing, unknown or of a wrong type; names it.

    Example:
        >>> from paredown.core.measurement import Measurement
        >>> decoded(Measurement, {"size_bytes": 3}).size_bytes
        3
        >>> decoded(Measurement, {"size_bytes": "3"}, "baseline")
        Traceback (most recent call last):
            ...
        ValueError: field 'baseline.size_bytes': expected a whole number, got '3'
    """
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        [one] = [each for each in inner if each is not type(None)]  # a type, or None
        return None if value is None else decoded(one, value, where)
    if origin is typing.Literal:
        return value if value in inner else _wrong(where, f"one of {', '.join(inner)}", value)
    if origin is list:
        if not isinstance(value, list):
            _wrong(where, "a list", value)
        return [decoded(inner[0], each, f"{where}[{n}]") for n, each in enumerate(value)]
    if origin is dict or dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        if not isinstance(value, dict):
            _wrong(where, "an object", value)
        if origin is dict:
            return {key: decoded(inner[1], each, _in(where, key)) for key, each in value.items()}
        return _object(kind, value, where)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        _wrong(where, _PLAIN[kind], value)
    return value


def _object(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):  # which may hold more, or less
        known = {key: each for key, each in value.items() if key in hints and each is not None}
        return value | {
            key: decoded(hints[key], each, _in(where, key)) for key, each in known.items()
        }
    fields = {each.name: each for each in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise ValueError(f"field {_in(where, key)!r} is unknown to this version of paredown")
    for name, field in fields.items():
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise ValueError(f"field {_in(where, name)!r} is missing")
    return kind(**{key: decoded(hints[key], each, _in(where, key)) for key, each in value.items()})


def _in(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _wrong(where: str, expected: str, value: Any) -> typing.NoReturn:
    place = f"field {where!r}: " if where else ""
    raise ValueError(f"{place}expected {expected}, got {described(value)}")
