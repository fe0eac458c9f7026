"""Whose size can be moved: channels made by one parameter and read by another, and by nothing else.

A factor taken out of what makes a channel and put into what reads it leaves the model's output as
it was, as long as every op between keeps factors: ReLU and pooling do, GELU and softmax do not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from paredown.graph.coupling import scaling_rules
from paredown.graph.coupling.labels import PINNED
from paredown.graph.coupling.scale_walk import Exchange, Walk
from paredown.graph.state import tensor_of


def exchange(graph: fx.GraphModule) -> Exchange:
    """All factors of a graph that can be moved; its nodes must have ``meta["val"]``.

    Example:
        >>> import torch, paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> found = exchange(paredown.capture(net, (torch.zeros(1, 4),)).graph)
        >>> [part.name for part in found.makers], [reader.part.name for reader in found.readers]
        (['0.weight', '0.bias'], ['2.weight'])
    """
    walk = Walk(graph)
    for node in graph.graph.nodes:
        walk.values[node] = scaling_rules.visit(walk, node)
    return walk.found()


def move(graph: fx.GraphModule, found: Exchange, factors: np.ndarray) -> None:
    """Multiply what makes each channel by its factor (count,), divide what reads it; in place."""
    factors = np.where(np.arange(found.count) == PINNED, 1.0, factors)
    with torch.no_grad():
        for part in found.makers:
            _multiply(tensor_of(graph, part.name), factors[part.labels])
        for reader in found.readers:
            _multiply(tensor_of(graph, reader.part.name), 1 / factors[reader.part.labels])


def _multiply(tensor: Tensor, factors: np.ndarray) -> None:
    tensor.copy_((tensor.double() * torch.from_numpy(factors).to(tensor.device)).to(tensor.dtype))
