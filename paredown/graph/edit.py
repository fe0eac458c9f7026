"""Edits of a captured graph, each in place: fold batch norms, insert and replace ops."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from paredown.graph.mode import is_counter

aten = torch.ops.aten


def erase_counters(graph: fx.GraphModule) -> None:
    """Drop the ops that count batch-norm batches: they change state at every call."""
    for node in reversed(list(graph.graph.nodes)):
        if is_counter(node) and not node.users:
            counter = node.args[0]
            graph.graph.erase_node(node)
            if counter.op == "get_attr" and not counter.users:
                graph.graph.erase_node(counter)
    graph.recompile()


def insert_after(
    value: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    users: Collection[fx.Node] | None = None,
) -> fx.Node:
    """A new op on ``value`` that takes over its users, or those that are given."""
    graph = value.graph
    with graph.inserting_after(value):
        made = graph.call_function(target, (value, *args))
    taken = set(value.users if users is None else users) - {made}
    value.replace_all_uses_with(made, delete_user_cb=lambda user: user in taken)
    keep_meta(made, value)
    return made


def keep_meta(made: fx.Node, source: fx.Node) -> None:
    """A new op belongs to the module and the source line of the op that it stands for."""
    for key in ("nn_module_stack", "stack_trace", "val"):
        if key in source.meta:
            made.meta[key] = source.meta[key]


def is_unpacked(node: fx.Node) -> bool:
    """Whether what a node returns is read value by value alone."""
    return all(user.target is operator.getitem for user in node.users)


def copy_ops(graph: fx.Graph, inner: fx.Graph, arguments: Sequence[Any]) -> Any:
    """Copy another graph's ops to where this one is written; what it returns, in this one."""
    rest = iter(arguments)
    copied: dict[fx.Node, Any] = {}
    for node in inner.nodes:
        if node.op == "placeholder":
            copied[node] = next(rest)
        elif node.op == "output":
            return fx.map_arg(node.args[0], copied.__getitem__)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    raise AssertionError("a graph without an output")


def hand_over(node: fx.Node, made: Any) -> dict[fx.Node, fx.Node]:
    """Put a value, or several, in the place of a node that goes; which stands for which."""
    if isinstance(made, fx.Node):
        placed = {node: made}
    else:
        placed = {user: made[user.args[1]] for user in node.users}
    for old, new in placed.items():
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
    if node not in placed:
        node.graph.erase_node(node)
    return placed
