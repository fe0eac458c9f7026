"""Arguments of ops by name."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments(node: fx.Node) -> dict[str, Any]:
    """The op's arguments by their names in its schema, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    found = {item.name: item.default_value for item in schema if item.has_default_value()}
    found |= {schema[place].name: value for place, value in enumerate(node.args)}
    return found | dict(node.kwargs)


def argument(node: fx.Node, name: str) -> Any:
    """One of the op's `arguments`; None where its schema has none of that name."""
    return arguments(node).get(name)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    target: Any = node.target
    names = [item.name for item in target._schema.arguments]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def number(size: Any) -> int:
    """A size in plain numbers: one that the graph computes stands for its example's."""
    value = size.meta["val"] if isinstance(size, fx.Node) else size
    return value if isinstance(value, int) else int(value.node.hint)


def listed(dims: Any, rank: int) -> list[int]:
    """Dimensions as non-negative numbers; None or an empty list means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    return [d % max(1, rank) for d in ([dims] if isinstance(dims, int) else dims)]
