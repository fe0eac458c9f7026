"""Outputs that lie between 0 and 1 by what makes them: kernels compute them to a fixed error."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
BETWEEN = {
    *(aten.sigmoid.default, aten.hardsigmoid.default),
    *(aten.softmax.int, aten._softmax.default),
}
PLACED = {  # ops that put values elsewhere, and leave them as they are
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int),
    *(aten.permute.default, aten.transpose.int, aten.squeeze.dim, aten.squeeze.default),
    *(aten.unsqueeze.default, aten.contiguous.default, aten.clone.default, aten.select.int),
    *(aten.slice.Tensor, aten.squeeze.dims, aten.alias.default),
}


def between_0_and_1(graph: fx.GraphModule) -> list[bool]:
    """Of each output of a captured graph, whether a sigmoid or softmax made it.

    Example:
        >>> import paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Softmax(1))
        >>> between_0_and_1(paredown.capture(net, (torch.zeros(1, 4),)).graph)
        [True]
    """
    outputs: Any = graph.graph.output_node().args[0]
    return [_is_between(each) for each in outputs]


def _is_between(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.target in PLACED:
        value = value.args[0]
    if isinstance(value, fx.Node) and value.target is aten.cat.default:
        parts: Any = value.args[0]
        return all(_is_between(each) for each in parts)
    return isinstance(value, fx.Node) and value.target in BETWEEN
