"""The nesting of a model's inputs and outputs, apart from the tensors in it.

A structure is JSON: ``"*"`` stands for a tensor, ``{"const": v}`` for a plain value,
``{"tuple": [...]}``, ``{"list": [...]}`` and ``{"dict": {...}}`` for containers,
``{"object": "module:Class", "fields": {...}}`` for dataclasses and named tuples, and
``{"alone": {"logits": "*"}}`` for a tensor that has a name and no container.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Structure = Any  # str | dict[str, Any], as above; recursive


class Outputs(dict[str, Any]):
    """Named outputs of a class that is not imported here: a dict whose keys are attributes too.

    Example:
        >>> Outputs(logits=1).logits
        1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def flatten(value: Any) -> tuple[list[Tensor], Structure]:
    """The tensors of a nested value, in order, and the structure around them.

    Example:
        >>> import torch
        >>> leaves, structure = flatten({"logits": torch.zeros(2), "extra": (None, torch.ones(1))})
        >>> len(leaves), structure["dict"]["logits"]
        (2, '*')
    """
    if isinstance(value, Tensor):
        return [value], "*"
    if value is None or isinstance(value, (bool, int, float, str)):
        return [], {"const": value}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        kind = "tuple" if isinstance(value, tuple) else "list"
        leaves, parts = _flatten_all(list(value))
        return leaves, {kind: parts}
    fields = _fields(value)
    if fields is None:
        return [], {"opaque": type(value).__name__}
    leaves, parts = _flatten_all(list(fields.values()))
    named = dict(zip(fields, parts, strict=True))
    if type(value) is dict:
        return leaves, {"dict": named}
    return leaves, {
        "object": f"{type(value).__module__}:{type(value).__qualname__}",
        "fields": named,
    }


def _fields(value: Any) -> dict[str, Any] | None:
    if hasattr(value, "_asdict"):  # named tuple
        return dict(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _flatten_all(values: list[Any]) -> tuple[list[Tensor], list[Structure]]:
    leaves: list[Tensor] = []
    parts = []
    for value in values:
        inner, structure = flatten(value)
        leaves += inner
        parts.append(structure)
    return leaves, parts


def unflatten(leaves: list[Any], structure: Structure) -> Any:
    """The nested value of ``structure`` with ``leaves`` in the places of its tensors.

    Example:
        >>> unflatten([1, 2], {"tuple": ["*", {"dict": {"a": "*"}}]})
        (1, {'a': 2})
    """
    rest = iter(leaves)
    value = _build(rest, structure)
    if next(rest, None) is not None:
        raise ValueError("more tensors than the structure has places for")
    return value


def _build(leaves: Iterator[Any], structure: Structure) -> Any:
    if structure == "*":
        return next(leaves)
    if "const" in structure:
        return structure["const"]
    if "opaque" in structure:
        return None
    if "alone" in structure:
        (part,) = structure["alone"].values()
        return _build(leaves, part)
    if "tuple" in structure:
        return tuple(_build(leaves, part) for part in structure["tuple"])
    if "list" in structure:
        return [_build(leaves, part) for part in structure["list"]]
    named = structure.get("dict", structure.get("fields"))
    fields = {name: _build(leaves, part) for name, part in named.items()}
    return fields if "dict" in structure else _object(structure["object"], fields)


def _object(spelled: str, fields: dict[str, Any]) -> Any:
    """An instance of a class that the program has imported; nothing is imported for it."""
    module, _, name = spelled.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not _holds_fields(found):
        return Outputs(fields)
    if issubclass(found, Mapping):  # a transformers ModelOutput leaves out what is None
        fields = {key: value for key, value in fields.items() if value is not None}
    try:
        return found(**fields)
    except TypeError:
        return Outputs(fields)


def _holds_fields(kind: type) -> bool:
    """Of the kinds that `flatten` takes apart; any other class might do things when called."""
    named = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return dataclasses.is_dataclass(kind) or issubclass(kind, dict) or named


def count(structure: Structure) -> int:
    """How many tensors the structure has places for.

    Raises:
        ValueError: it is not a structure.

    Example:
        >>> count({"tuple": ["*", {"dict": {"a": "*"}}, {"const": 3}]})
        2
    """
    if structure == "*":
        return 1
    if not isinstance(structure, dict):
        raise ValueError(f"not a structure: {structure!r}")
    if "const" in structure or "opaque" in structure:
        return 0
    for kind in ("tuple", "list"):
        if isinstance(structure.get(kind), list):
            return sum(count(part) for part in structure[kind])
    fields = structure.get("dict", structure.get("fields", structure.get("alone")))
    if not isinstance(fields, dict) or not isinstance(structure.get("object", ""), str):
        raise ValueError(f"not a structure: {structure!r}")
    return sum(count(part) for part in fields.values())


def names(structure: Structure, prefix: str = "") -> list[str]:
    """A name for each tensor: the path to it, joined by dots.

    Example:
        >>> names({"dict": {"logits": "*", "hidden": {"tuple": ["*", "*"]}}})
        ['logits', 'hidden.0', 'hidden.1']
    """
    if structure == "*":
        return [prefix]
    parts: Any = structure.get("dict") or structure.get("fields") or structure.get("alone")
    if parts is None:
        items = structure.get("tuple") or structure.get("list") or []
        parts = {str(index): part for index, part in enumerate(items)}
    found = []
    for name, part in parts.items():
        found += names(part, f"{prefix}.{name}" if prefix else name)
    return found


def alone(name: str) -> Structure:
    """That of a single tensor with a name, which its file gives it.

    Example:
        >>> names(alone("logits")), unflatten([1], alone("logits"))
        (['logits'], 1)
    """
    return {"alone": {name: "*"}}


def output_names(structure: Structure) -> list[str]:
    """The names of a file's outputs: as they are, or the path to them where they are nested.

    Example:
        >>> output_names("*"), output_names({"dict": {"a.b": "*", "c": {"tuple": ["*"]}}})
        (['output'], ['a.b', 'c_0'])
    """
    parts: Any = {} if structure == "*" else structure.get("dict") or structure.get("alone") or {}
    whole = {name for name, part in parts.items() if part == "*"}
    found = names(structure)
    return [name if name in whole else name.replace(".", "_") or "output" for name in found]


def opaque(structure: Structure, prefix: str = "") -> dict[str, str]:
    """Path -> type name of the parts that are neither tensors, plain values nor containers."""
    if structure == "*" or "const" in structure:
        return {}
    if "opaque" in structure:
        return {prefix or "output": structure["opaque"]}
    parts: Any = structure.get("dict") or structure.get("fields") or structure.get("alone")
    if parts is None:
        items = structure.get("tuple") or structure.get("list") or []
        parts = {str(index): part for index, part in enumerate(items)}
    found: dict[str, str] = {}
    for name, part in parts.items():
        found |= opaque(part, f"{prefix}.{name}" if prefix else name)
    return found
