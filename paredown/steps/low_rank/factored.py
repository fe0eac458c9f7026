"""Put a chain of two or three ops in place of one, whose weights make the one's, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import keep_meta
from paredown.graph.model import Model
from paredown.graph.ops import arguments
from paredown.graph.sites import Site, sites
from paredown.graph.state import getattr_or_none, remove_state, set_parameter, tensor_of

aten = torch.ops.aten
_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
SUFFIXES = {2: ("down", "up"), 3: ("down", "core", "up")}


def factor(
    model: Model,
    uses: Sequence[Site],
    factors: Sequence[Tensor],
    carried: Sequence[Sequence[int]],
) -> list[str]:
    """Replace the op of each use by one op for each factor, in place; the factors' names.

    The op's node becomes the last of them, so that what it gives keeps its name. The weight `NAME`
    goes; `NAME_down`, `NAME_core` (of three) and `NAME_up` come.

    Args:
        uses: all that read the weight, alike.
        factors: as the ops take them, in the order in which they run.
        carried: for each factor the dimensions of the kernel whose stride, padding and dilation
            its convolution has.
    """
    graph, weight = model.graph, uses[0].weight
    old = tensor_of(graph, weight)
    names = [_free(graph, f"{weight}_{suffix}") for suffix in SUFFIXES[len(factors)]]
    for name, value in zip(names, factors, strict=True):
        set_parameter(graph, name, value.to(old).contiguous())
        tensor_of(graph, name).requires_grad_(old.requires_grad)
    named = dict(graph.named_parameters(remove_duplicate=False))
    for use in uses:
        _replace(graph, use, names, carried)
    for name in [n for n, tensor in named.items() if tensor is old]:  # a tied weight has several
        remove_state(graph, name)
        model.kept.pop(name, None)
    graph.recompile()
    return names


def _free(graph: fx.GraphModule, name: str) -> str:
    while getattr_or_none(graph, name) is not None:
        name += "_"
    return name


def _replace(
    graph: fx.GraphModule, use: Site, names: list[str], carried: Sequence[Sequence[int]]
) -> None:
    """The ops before the last are new, the last is the old node with new arguments."""
    node, value = use.node, use.input
    calls = _calls(use, len(names), carried)
    for name, (target, before, after) in zip(names[:-1], calls[:-1], strict=True):
        with graph.graph.inserting_before(node):
            read = graph.graph.get_attr(name)
            value = graph.graph.call_function(
                target, (*before, *_ordered(target, value, read), *after)
            )
        keep_meta(value, node)
    target, before, after = calls[-1]
    with graph.graph.inserting_before(node):
        read = graph.graph.get_attr(names[-1])
    node.target, node.kwargs = target, {}
    node.args = (*before, *_ordered(target, value, read), *after)


def _ordered(target: Any, value: fx.Node, weight: fx.Node) -> tuple[fx.Node, fx.Node]:
    return (weight, value) if target is aten.embedding.default else (value, weight)


# An op, its arguments before the value and the weight, and those behind.
Call = tuple[Any, tuple[Any, ...], tuple[Any, ...]]


def _calls(use: Site, count: int, carried: Sequence[Sequence[int]]) -> list[Call]:
    node = use.node
    if use.kind == "embedding":
        return [(node.target, (), tuple(node.args[2:])), (aten.linear.default, (), (None,))]
    if use.kind == "linear":
        return [(node.target, (), (None,)), (node.target, (), (arguments(node)["bias"],))]
    if use.kind == "matmul":
        if node.target is aten.addmm.default:
            return [(aten.mm.default, (), ()), (node.target, (node.args[0],), ())]
        return [(node.target, (), ())] * 2
    biases = [None] * (count - 1) + [arguments(node)["bias"]]
    return [_convolution(node, *pair) for pair in zip(biases, carried, strict=True)]


def _convolution(node: fx.Node, bias: Any, carried: Sequence[int]) -> Call:
    """A convolution like the node's in some dimensions of its kernel, and 1 wide in the others."""
    dims = _dims(node)
    if not carried:
        return (
            _PLAIN[dims],
            (),
            (bias, [1] * dims, [0] * dims, [1] * dims, arguments(node)["groups"]),
        )
    named = arguments(node) | {"bias": bias}
    for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1)):
        if not isinstance(named[key], str):  # "same" and "valid" hold for any kernel
            each = _each(named[key], dims)
            named[key] = [size if dim in carried else usual for dim, size in enumerate(each)]
    schema: Any = node.target
    return node.target, (), tuple(named[item.name] for item in schema._schema.arguments[2:])


def _each(value: Any, count: int) -> list[int]:
    """One entry for each dimension, where a single one may stand for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def _dims(node: fx.Node) -> int:
    """The dimensions of a convolution's kernel."""
    name = str(node.target)
    return next(dims for dims in _PLAIN if f"{dims}d" in name)


# --- and back --------------------------------------------------------------------------------


def chains(graph: fx.GraphModule) -> list[list[Site]]:
    """The ops that `factor` put in place of one, in the order they run."""
    by_node = {site.node: site for site in sites(graph)}
    found = []
    for site in by_node.values():
        base, _, suffix = site.weight.rpartition("_")
        chain = [site]
        while suffix == "down" and chain[-1].weight != f"{base}_up":
            after = [by_node.get(user) for user in chain[-1].node.users]
            following = after[0] if len(after) == 1 else None
            if following is None or following.weight not in (f"{base}_core", f"{base}_up"):
                break
            chain.append(following)
        alone = all(each.bias is None for each in chain[:-1])
        if len(chain) > 1 and chain[-1].weight == f"{base}_up" and alone:
            found.append(chain)
    return found


def join(model: Model, uses: Sequence[Sequence[Site]], weight: Tensor) -> str:
    """Undo `factor`, in place: chains of the same factors become ops with the weight; its name."""
    graph, names = model.graph, [site.weight for site in uses[0]]
    name = names[0].removesuffix("_down")
    set_parameter(graph, name, weight)
    tensor_of(graph, name).requires_grad_(tensor_of(graph, names[0]).requires_grad)
    for chain in uses:
        _rejoin(graph, chain, name)
        for site in reversed(chain[:-1]):
            graph.graph.erase_node(site.node)
    for each in names:
        remove_state(graph, each)
        model.kept.pop(each, None)
    graph.recompile()
    return name


def _rejoin(graph: fx.GraphModule, chain: Sequence[Site], name: str) -> None:
    first, last = chain[0], chain[-1].node
    with graph.graph.inserting_before(last):
        read = graph.graph.get_attr(name)
    if first.kind == "embedding":
        target, args = first.node.target, (read, first.input, *first.node.args[2:])
    elif first.node.target is aten.mm.default and last.target is aten.addmm.default:
        target, args = last.target, (last.args[0], first.input, read)
    elif "conv" in first.kind:
        target, rest = _merged([site.node for site in chain])
        args = (first.input, read, arguments(last).get("bias"), *rest)
    else:
        target, args = last.target, (first.input, read, *last.args[2:])
    last.target, last.args, last.kwargs = target, args, {}


def _merged(nodes: Sequence[fx.Node]) -> tuple[Any, tuple[Any, ...]]:
    """The op of the whole kernel, and what it takes behind the bias.

    In each dimension one op of a chain may have a stride, a padding and a dilation.
    """
    named = [arguments(node) for node in nodes]
    spelled = [isinstance(each["padding"], str) for each in named]
    main = spelled.index(True) if any(spelled) else 0
    merged = dict(named[main])
    for key in ("stride", "padding", "dilation"):
        if not isinstance(merged[key], str):
            each = [_each(one[key], _dims(nodes[0])) for one in named]
            merged[key] = [max(sizes) for sizes in zip(*each, strict=True)]
    schema: Any = nodes[main].target
    return nodes[main].target, tuple(merged[i.name] for i in schema._schema.arguments[3:])
