"""Edits of a captured graph, each in place: fold batch norms, insert and replace ops."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.graph.mode import is_counter
from paredown.graph.model import Model, owner_of
from paredown.graph.sites import sees_through, sites, tensor_of

aten = torch.ops.aten


def wide(example: Tensor, dynamic: bool) -> Tensor:
    """Two of an example whose batch varies: a size of 1 would be taken for a fixed one."""
    return torch.cat([example, example]) if dynamic and example.shape[0] == 1 else example


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


def fold_batch_norm(graph: fx.GraphModule) -> list[str]:
    """Fold each batch norm into the convolution or linear layer before it; returns their weights.

    ``w' = w * g / sqrt(v + eps)`` and ``b' = (b - m) * g / sqrt(v + eps) + beta`` per output
    channel (Jacob et al. 1712.05877, section 3.2). The graph must be in evaluation mode.
    """
    erase_counters(graph)
    users = _uses(graph)
    folded = []
    for site in sites(graph):
        norm = next(iter(site.node.users), None)
        plain = site.kind in ("conv", "linear") or (
            site.kind == "conv_transpose" and _argument(site.node, 6, 1) == 1
        )
        if (
            plain
            and norm is not None
            and len(site.node.users) == 1
            and norm.target is aten.batch_norm.default
            and norm.args[0] is site.node
            and norm.args[3] is not None
            and not norm.args[5]
            and users[site.weight] == 1
            and _channels_match(site.kind, norm)
        ):
            _fold(graph, site.node, site.weight, site.bias, site.axis, norm)
            folded.append(site.weight)
    graph.recompile()
    return folded


def _channels_match(kind: str, norm: fx.Node) -> bool:
    """A linear layer's channels are the norm's only where its output is (B, C)."""
    value = norm.meta.get("val")
    return kind != "linear" or (isinstance(value, Tensor) and value.dim() == 2)


def _argument(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _uses(graph: fx.GraphModule) -> dict[str, int]:
    """Parameter name -> how many ops read its tensor, under this name or a tied one."""
    counts: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found = getattr_or_none(graph, str(node.target))
            if isinstance(found, Tensor):
                read = sum(len(u.users) if sees_through(u) else 1 for u in node.users)
                counts[id(found)] = counts.get(id(found), 0) + read
    names = {site.weight for site in sites(graph)}
    return {name: counts[id(tensor_of(graph, name))] for name in names}


def getattr_or_none(graph: nn.Module, name: str) -> Any:
    found: Any = graph
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _fold(
    graph: fx.GraphModule, node: fx.Node, weight: str, bias: str | None, axis: int, norm: fx.Node
) -> None:
    operands = [arg if isinstance(arg, fx.Node) else None for arg in norm.args[1:5]]
    gamma, beta, mean, variance = (_double(graph, operand) for operand in operands)
    eps: Any = norm.args[7]
    w = tensor_of(graph, weight)
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + eps) * (1.0 if gamma is None else gamma)  # (C,)
    old = tensor_of(graph, bias).detach().double() if bias else torch.zeros_like(mean)
    shift = (old - mean) * scale + (0.0 if beta is None else beta)  # (C,)
    shape = [-1 if dim == axis else 1 for dim in range(w.dim())]
    with torch.no_grad():
        exact = torch.promote_types(w.dtype, torch.float32)
        w.copy_(w * scale.reshape(shape).to(exact))
    name = bias or _free_name(graph, weight)
    set_parameter(graph, name, shift.to(w.dtype))
    _set_bias(graph, node, name)
    norm.replace_all_uses_with(node)
    graph.graph.erase_node(norm)
    for operand in operands:
        if operand is not None and not operand.users:
            graph.graph.erase_node(operand)
            remove_state(graph, str(operand.target))
    assert operands[2] is not None
    prefix = str(operands[2].target).rpartition(".")[0]
    remove_state(graph, f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked")


def _double(graph: fx.GraphModule, operand: fx.Node | None) -> Tensor | None:
    return None if operand is None else tensor_of(graph, str(operand.target)).detach().double()


def _free_name(graph: fx.GraphModule, weight: str) -> str:
    stem, _, leaf = weight.rpartition(".")
    name = leaf.replace("weight", "bias") if "weight" in leaf else f"{leaf}_bias"
    full = f"{stem}.{name}" if stem else name
    while getattr_or_none(graph, full) is not None:
        full += "_folded"
    return full


def _set_bias(graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    with graph.graph.inserting_before(node):
        bias = graph.graph.get_attr(name)
    args = list(node.args) + [None] * (3 - len(node.args))
    args[2] = bias
    node.args = tuple(args)


def set_parameter(graph: nn.Module, name: str, value: Tensor) -> None:
    """Put a trainable tensor at that name, in place of what stood there."""
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))


def set_buffer(graph: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor that does not train at that name."""
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_buffer(leaf, value)


def remove_state(graph: fx.GraphModule, name: str) -> None:
    """Delete a parameter or buffer, unless an op still reads it."""
    if any(n.op == "get_attr" and n.target == name and n.users for n in graph.graph.nodes):
        return
    for node in [n for n in graph.graph.nodes if n.op == "get_attr" and n.target == name]:
        graph.graph.erase_node(node)
    owner, leaf = owner_of(graph, name), name.rpartition(".")[2]
    if hasattr(owner, leaf):
        delattr(owner, leaf)


def refresh_values(model: Model) -> None:
    """Give every node its ``meta["val"]`` again: shape and dtype, from a run on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    leaves = [wide(item.example, 0 in item.dynamic) for item in model.inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FakeTensorProp(model.graph, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*leaves)
