"""Weights that are computed from parameters alone: weight norm, spectral norm, standardised
convolutions.

A technique that changes weights needs the weight itself. What is computed at every call though no
input goes in is computed once here, and stands in the place of what it was made of.
"""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.holds import own_zeros
from paredown.graph.holds.every import held_names
from paredown.graph.model import Model
from paredown.graph.sites import weight_places
from paredown.graph.state import getattr_or_none, remove_state, set_parameter, tensor_of

aten = torch.ops.aten
# Ops that show a parameter otherwise and compute nothing; such a weight is still the parameter.
_VIEWS = frozenset(
    {
        *(aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default),
        *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default),
        *(aten.detach.default, aten.detach_.default, aten.contiguous.default, aten.clone.default),
        *(aten.to.dtype, aten.expand.default, aten.flatten.using_ints, aten.slice.Tensor),
        *(aten.mT.default, aten.numpy_T.default, aten.unflatten.int, aten.select.int),
        *(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, operator.getitem),
        *(aten.unbind.int, aten.narrow.default),
    }
)
_ORIGINAL = re.compile(r"(?:parametrizations\.)?(?P<name>\w+?)(?:\.original\d*|_v|_orig)$")


def fold_computed_weights(model: Model) -> list[str]:
    """Replace, in place, each weight that follows from parameters alone by its value.

    Weights stay as they are where something else reads what they are made of, and where that is
    masked, shared or not learnt. The model's function stays as it was. Returns the weights' names.

    Example:
        >>> import paredown
        >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 2))
        >>> model = paredown.capture(layer, (torch.zeros(1, 4),)).copy()
        >>> fold_computed_weights(model), sorted(model.state_dict())
        (['weight'], ['bias', 'weight'])
    """
    graph, made = model.graph, []
    for node in list(graph.graph.nodes):
        for place in weight_places(node):
            weight = node.args[place]
            if isinstance(weight, fx.Node) and weight.op == "call_function":
                name = _fold(model, weight)
                made += [name] if name else []
    if made:
        graph.graph.lint()
        graph.recompile()
    return made


def _fold(model: Model, weight: fx.Node) -> str | None:
    """The name of the parameter that now stands for a computed weight; None where it is none."""
    found = _ingredients(weight)
    if found is None or all(node.target in _VIEWS for node in found if node.op != "get_attr"):
        return None
    leaves = {str(node.target): node for node in found if node.op == "get_attr"}
    graph = model.graph
    if not _alone(graph, leaves, found) or leaves.keys() & held_names(model):
        return None
    with torch.no_grad():
        value = _value(graph, found, weight)
    if value.dim() < 2 or not value.is_floating_point():
        return None
    learnt = [name for name in leaves if isinstance(tensor_of(graph, name), torch.nn.Parameter)]
    if not learnt:  # a fixed transform is no weight
        return None
    source = max(learnt, key=lambda name: tensor_of(graph, name).numel())
    with graph.graph.inserting_before(weight):
        name = _name(graph, source)
        held = graph.graph.create_node("get_attr", name, name=f"{weight.name}_folded")
    held.meta["val"] = weight.meta.get("val")
    weight.replace_all_uses_with(held)
    for node in reversed(found):
        graph.graph.erase_node(node)
    for leaf in leaves:
        model.kept.pop(leaf, None)
        remove_state(graph, leaf)
    set_parameter(graph, name, value.contiguous())
    mask = own_zeros.kept(value)
    if not bool(mask.all()):  # zeros that a mask in the model's own graph has held
        model.masks[name] = mask
    return name


def _ingredients(weight: fx.Node) -> list[fx.Node] | None:
    """The nodes that a value follows from, itself last; None where one of them is an input, draws
    at random, changes what it reads, or is one of our own."""
    found: set[fx.Node] = set()
    left = [weight]
    while left:
        node = left.pop()
        if node in found:
            continue
        found.add(node)
        if node.op != "get_attr" and not _is_pure(node):
            return None
        left += node.all_input_nodes
    return [node for node in weight.graph.nodes if node in found]


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", "") == "_operator"
    keeps_statistics = node.target is aten.batch_norm.default and node.args[3] is not None
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    ours = node.target.namespace not in ("aten", "prims")
    return not (ours or random or keeps_statistics or node.target._schema.is_mutable)


def _alone(graph: fx.GraphModule, leaves: dict[str, fx.Node], found: list[fx.Node]) -> bool:
    """Whether the parameters, under any name, and what is made of them are read here alone."""
    inside = {*found}
    if any(not {*node.users} <= inside for node in found[:-1]):
        return False
    held = {id(tensor_of(graph, name)) for name in leaves}
    return not any(
        node.op == "get_attr"
        and id(getattr_or_none(graph, str(node.target))) in held
        and not {*node.users} <= inside
        for node in graph.graph.nodes
    )


def _value(graph: fx.GraphModule, found: list[fx.Node], weight: fx.Node) -> Tensor:
    values: dict[fx.Node, Any] = {}
    for node in found:
        if node.op == "get_attr":
            values[node] = tensor_of(graph, str(node.target)).detach()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    made: Tensor = values[weight]
    return made.clone()


def _name(graph: fx.GraphModule, source: str) -> str:
    """``conv.parametrizations.weight.original1`` and ``conv.weight_v`` become ``conv.weight``."""
    matched = _ORIGINAL.search(source)
    if matched is None:
        return source
    name = f"{source[: matched.start()]}{matched['name']}"
    return source if getattr_or_none(graph, name) is not None else name
