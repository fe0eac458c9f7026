"""Which op uses which weight, in which layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.state import getattr_or_none, tensor_of

aten = torch.ops.aten

# op -> (kind, position of the input, of the weight, of the bias, the weight's output axis)
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding, aten.convolution.default),
)
_TRANSPOSED = (
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input),
    aten.conv_transpose3d.input,
)
_OPS: dict[Any, tuple[str, int, int, int | None, int]] = {
    **dict.fromkeys(CONVOLUTIONS, ("conv", 0, 1, 2, 0)),
    **dict.fromkeys(_TRANSPOSED, ("conv_transpose", 0, 1, 2, 1)),
    aten.linear.default: ("linear", 0, 1, 2, 0),
    aten.addmm.default: ("matmul", 1, 2, 0, 1),
    aten.mm.default: ("matmul", 0, 1, None, 1),
    aten.matmul.default: ("matmul", 0, 1, None, 1),
    aten.embedding.default: ("embedding", 1, 0, None, 0),
}
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@dataclass(frozen=True)
class Site:
    """One use of a weight by an op.

    ``axis`` is the weight's output-channel dimension; ``groups`` is above 1 for grouped
    convolutions. ``weight`` and ``bias`` are parameter names.
    """

    node: fx.Node
    kind: str  # conv, conv_transpose, linear, matmul, embedding, recurrent
    weight: str
    bias: str | None
    axis: int

    @property
    def input(self) -> fx.Node:
        position = next((row[1] for op, row in _OPS.items() if op is self.node.target), 0)
        found: Any = self.node.args[position]
        assert isinstance(found, fx.Node)
        return found


def sites(graph: fx.GraphModule) -> list[Site]:
    """Every use of a weight of two or more dimensions, in the order the graph runs them.

    Example:
        >>> import torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> [(site.kind, site.weight, site.axis) for site in sites(model.graph)]
        [('linear', 'weight', 0)]
    """
    return [site for node in graph.graph.nodes for site in _sites_of(node, graph)]


def _sites_of(node: fx.Node, graph: fx.GraphModule) -> Iterator[Site]:
    if node.op != "call_function":
        return
    if node.target in _OPS:
        kind, _, place, bias, axis = _OPS[node.target]
        name = _parameter(node, place)
        if name is not None and tensor_of(graph, name).dim() >= 2:
            bias_name = None if bias is None else _parameter(node, bias)
            yield Site(node, kind, name, bias_name, axis)
    elif node.target in RECURRENT:
        weights: Any = node.args[2]
        for weight in weights:
            name = _parameter_of(weight)
            if name is not None and tensor_of(graph, name).dim() >= 2:
                yield Site(node, "recurrent", name, None, 0)


def weight_places(node: fx.Node) -> list[int]:
    """Where an op that can be a `Site` has its weight among its arguments, computed or not."""
    return [_OPS[node.target][2]] if node.op == "call_function" and node.target in _OPS else []


def _parameter(node: fx.Node, position: int) -> str | None:
    """The name of the parameter at this place of the op's arguments."""
    return _parameter_of(node.args[position]) if position < len(node.args) else None


def _parameter_of(found: Any) -> str | None:
    """The name of the parameter that is given, through a fake quantizer."""
    if isinstance(found, fx.Node) and sees_through(found):
        found = found.args[0]
    if isinstance(found, fx.Node) and found.op == "get_attr":
        return str(found.target)
    return None


def readers(graph: fx.GraphModule) -> dict[int, set[fx.Node]]:
    """The id of each parameter and buffer -> the ops that read it, under whatever name.

    Example:
        >>> import paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> graph = paredown.capture(net, (torch.randn(2, 4),)).graph
        >>> [len(readers(graph)[id(tensor_of(graph, n))]) for n in ("0.weight", "0.bias")]
        [2, 1]
    """
    found: dict[int, set[fx.Node]] = {id(t): set() for t in (*graph.parameters(), *graph.buffers())}
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr_or_none(graph, str(node.target))
        if isinstance(tensor, Tensor):  # not the graph of a region
            found.setdefault(id(tensor), set()).update(node.users)
    return found


def sees_through(node: fx.Node) -> bool:
    """Whether the op is a fake quantizer, behind which a weight is still itself."""
    return "fake_quantize" in str(node.target)
