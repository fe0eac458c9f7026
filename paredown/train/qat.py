"""Quantization-aware training: quantizers as they train, and back to the one quantized form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.model import Model
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import (
    PER_TENSOR,
    least_weight_scales,
    quantizers,
    raise_scales,
)
from paredown.graph.quantized.regions import source_of
from paredown.graph.quantized.rounding import (
    fake_quantize_average,
    fake_quantize_channel_training,
    fake_quantize_following,
    fake_quantize_moved,
    fake_quantize_training,
    following_scales,
    grid_of,
    largest_of,
)
from paredown.graph.state import remove_state, set_buffer, set_parameter, tensor_of

KINDS = ("learned", "average", "frozen")
_OF_WEIGHTS = (fake_quantize_channel_training, fake_quantize_following)
_TRAINING = (*_OF_WEIGHTS, fake_quantize_training, fake_quantize_average, fake_quantize_moved)


# --- to the forms that train -----------------------------------------------------------------


def attach(model: Model, kind: str) -> None:
    """Put quantizers that train, of one of the `KINDS`, where the fake quantizers are, in place."""
    graph = model.graph
    for node in quantizers(graph):
        if node.target is PER_TENSOR:
            _attach_activation(graph, node, kind)
        elif node.target is PER_CHANNEL:
            _attach_weight(graph, node, kind)
    graph.graph.lint()
    graph.recompile()


def _attach_activation(graph: fx.GraphModule, node: fx.Node, kind: str) -> None:
    arguments: Any = node.args
    x, scale, zero_point, low, high = arguments
    source = source_of(x)
    if source is not x and source.target in _TRAINING:
        node.target = fake_quantize_moved
    elif kind == "average":
        ends = torch.tensor([(low - zero_point) * scale, (high - zero_point) * scale])
        span = _read(graph, node, f"{node.name}_span", ends)
        node.target, node.args = fake_quantize_average, (x, span, low, high)
    else:
        start = _read(graph, node, f"{node.name}_start", torch.tensor(scale))
        change = _change(graph, node, kind, f"{node.name}_change", torch.zeros(()))
        node.target = fake_quantize_training
        node.args = (x, start, change, zero_point, low, high)


def _attach_weight(graph: fx.GraphModule, node: fx.Node, kind: str) -> None:
    arguments: Any = node.args
    weight, held, axis, low, high = arguments
    name = str(held.target)
    scale = tensor_of(graph, name)
    if kind == "average":
        largest = largest_of(tensor_of(graph, str(weight.target)), axis)
        read = _read(graph, node, f"{name}_largest", largest)
        node.target, node.args = fake_quantize_following, (weight, held, read, axis, low, high)
    else:
        change = _change(graph, node, kind, f"{name}_change", torch.zeros_like(scale))
        node.target = fake_quantize_channel_training
        node.args = (weight, held, change, axis, low, high)


def _read(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer of that name, and the node that reads it."""
    set_buffer(graph, name, value)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _change(
    graph: fx.GraphModule, before: fx.Node, kind: str, name: str, value: Tensor
) -> fx.Node | None:
    """A parameter of that name and the node that reads it, where scales learn."""
    if kind != "learned":
        return None
    set_parameter(graph, name, value)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


# --- while they train ------------------------------------------------------------------------


def changes(model: Model) -> set[int]:
    """The ids of the parameters by which scales learn."""
    forms = (fake_quantize_training, fake_quantize_channel_training)
    nodes = [node for node in model.graph.graph.nodes if node.target in forms]
    found = [_values(model.graph, node)[2] for node in nodes]
    return {id(change) for change in found if change is not None}


def trains(model: Model) -> bool:
    """Whether quantizers that train are in place."""
    return any(node.target in _TRAINING for node in model.graph.graph.nodes)


def hold(model: Model) -> None:
    """Raise weight scales to where every bias fits 32 bits, as the exported file will need it."""
    graph = model.graph
    least = least_weight_scales(graph, lambda node: (_grid(graph, node) or [None])[0])
    with torch.no_grad():
        for node, scales in least.items():
            if node.target in _OF_WEIGHTS:
                _raise(graph, node, scales)
            else:
                raise_scales(graph, node, scales)


def _raise(graph: fx.GraphModule, node: fx.Node, least: Tensor) -> None:
    """The scales that are too small become ``least``, from which they go on."""
    weight, scale, moving, axis, *_ = _values(graph, node)
    low = _weight_scales(graph, node) < least
    scale.copy_(torch.where(low, least, scale))
    if node.target is fake_quantize_following:
        moving.copy_(torch.where(low, largest_of(weight, axis), moving))
    elif moving is not None:
        moving.copy_(torch.where(low, 0, moving))


def _values(graph: fx.GraphModule, node: fx.Node) -> list[Any]:
    """A node's arguments, each tensor that it reads in the place of the reading node."""
    return [
        tensor_of(graph, str(arg.target))
        if isinstance(arg, fx.Node) and arg.op == "get_attr"
        else arg
        for arg in node.args
    ]


def _changed(scale: Tensor, change: Tensor | None) -> Tensor:
    return scale.detach() if change is None else scale.detach() * change.detach().exp()


def _weight_scales(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    weight, scale, moving, *rest = _values(graph, node)
    if node.target is fake_quantize_following:
        return following_scales(weight, scale, moving, rest[0])
    return _changed(scale, moving)


def _grid(graph: fx.GraphModule, node: fx.Node) -> tuple[float, int] | None:
    """Scale and zero point of an activation that is rounded, or None where it is in float."""
    while node.target is fake_quantize_moved:
        node = source_of(node.args[0])  # type: ignore[arg-type]
    values = _values(graph, node)
    if node.target is fake_quantize_average:
        scale, zero_point = grid_of(values[1])
        return float(scale), int(zero_point)
    if node.target is fake_quantize_training:
        return float(_changed(values[1], values[2])), values[3]
    return None


# --- and back --------------------------------------------------------------------------------


def bake(model: Model) -> None:
    """Put fake quantizers with the scales of now where those that train are, in place.

    The graph computes the same numbers as before, bit for bit.
    """
    graph = model.graph
    hold(model)
    nodes = [node for node in graph.graph.nodes if node.target in _TRAINING]
    grids = {node: _grid(graph, node) for node in nodes if node.target not in _OF_WEIGHTS}
    for node in nodes:
        read = node.all_input_nodes
        grid = grids.get(node)
        if grid is not None:
            node.target, node.args = PER_TENSOR, (node.args[0], *grid, *node.args[-2:])
        else:
            weight, held, _, *rest = node.args
            set_buffer(graph, str(held.target), _weight_scales(graph, node))
            node.target, node.args = PER_CHANNEL, (weight, held, *rest)
        for gone in read:
            if not gone.users:
                graph.graph.erase_node(gone)
                remove_state(graph, str(gone.target))
    graph.graph.lint()
    graph.recompile()
