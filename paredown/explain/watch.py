"""What the values that are rounded look like: their ranges, channels, and what rounding costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from paredown.data.observe import Statistics
from paredown.explain.layers import Layer
from paredown.graph.quantized.quantizers import PER_TENSOR
from paredown.graph.quantized.regions import MOVERS

aten = torch.ops.aten


@dataclass
class Spread:
    """Of the channels of a value, over all that was seen: lowest and highest, (C,) each."""

    dim: int
    low: Tensor | None = None
    high: Tensor | None = None
    values: int = 0  # of each channel

    def add(self, value: Tensor) -> None:
        if value.dim() < 2 or not value.is_floating_point() or not value.numel():
            return
        dim = self.dim % value.dim()
        others = [d for d in range(value.dim()) if d != dim]
        low, high = value.amin(others).float(), value.amax(others).float()
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.low.shape == low.shape:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.values += value.numel() // value.shape[dim]


@dataclass
class Rounded:
    """A value that a quantizer rounds, and the error that the rounding makes.

    Attributes:
        low, high: the ends of the quantizer's range.
        inside, outside: squared errors, summed, of the values within the range and beyond it.
        parts: where the value joins others: how many channels each of them has.
    """

    quantizer: fx.Node
    low: float
    high: float
    spread: Spread
    statistics: Statistics = field(default_factory=Statistics)
    inside: float = 0.0
    outside: float = 0.0
    beyond: int = 0
    values: int = 0
    parts: tuple[int, ...] = ()

    @property
    def source(self) -> fx.Node:
        return self.quantizer.all_input_nodes[0]

    @property
    def span(self) -> float:
        return self.high - self.low

    def add(self, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            return
        self.statistics.add(value, histogram=True)
        self.spread.add(value)
        error = (self.quantizer.target(value, *self.quantizer.args[1:]) - value).square()  # type: ignore[operator]
        beyond = (value < self.low) | (value > self.high)
        outside, whole = float(error[beyond].double().sum()), float(error.double().sum())
        self.inside, self.outside = self.inside + whole - outside, self.outside + outside
        self.beyond += int(beyond.sum())
        self.values += value.numel()


class Watch:
    """Looks at the values that quantizers with a range of their own round, and at layers' results.

    Call it with every node and value of the graph without rounding.
    """

    def __init__(self, graph: fx.GraphModule, layers: Sequence[Layer]):
        self.rounded = {
            node.all_input_nodes[0]: _rounded(node, layers)
            for node in graph.graph.nodes
            if node.target is PER_TENSOR and not _shared(node)
        }
        self.results = {layer.exact: Spread(layer.channels) for layer in layers}
        self._shapes: dict[fx.Node, torch.Size] = {}

    def __call__(self, node: fx.Node, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        self._shapes[node] = value.shape
        if node in self.results:
            self.results[node].add(value)
        found = self.rounded.get(node)
        if found is not None and value.is_floating_point():
            found.add(value)
            if node.target is aten.cat.default:
                found.parts = self._parts(node, found.spread.dim % value.dim())

    def _parts(self, node: fx.Node, dim: int) -> tuple[int, ...]:
        """The channels of each value that is joined; none where they are joined along others."""
        joined: Any = node.args[0]
        along: Any = node.args[1] if len(node.args) > 1 else 0
        shapes = [self._shapes[each] for each in joined]
        along %= len(shapes[0])
        return tuple(shape[dim] for shape in shapes) if along == dim else ()


def _rounded(quantizer: fx.Node, layers: Sequence[Layer]) -> Rounded:
    scale, zero, low, high = (float(arg) for arg in quantizer.args[1:])  # type: ignore[arg-type]
    spread = Spread(_channels(quantizer, layers))
    return Rounded(quantizer, (low - zero) * scale, (high - zero) * scale, spread)


def _shared(quantizer: fx.Node) -> bool:
    """Whether its range is that of the value that its own was moved from."""
    source = quantizer.all_input_nodes[0]
    while source.target in MOVERS and source.all_input_nodes:
        source = source.all_input_nodes[0]
        if source.target is PER_TENSOR:
            return source.args[1:] == quantizer.args[1:]
    return False


def _channels(quantizer: fx.Node, layers: Sequence[Layer]) -> int:
    """The dimension of the channels, as those see it who make the value or read it."""
    for layer in layers:
        if layer.result is quantizer:
            return layer.channels
    for layer in layers:
        if layer.site.input is quantizer:
            return layer.channels
    return 1


def made_by(found: Rounded, layers: Iterable[Layer]) -> list[Layer]:
    """The layer whose result this is."""
    return [layer for layer in layers if layer.result is found.quantizer]


def read_from(found: Rounded, layers: Iterable[Layer]) -> list[Layer]:
    """The layers that read the value, also where it was moved on the way."""
    reached, todo = {found.quantizer}, [found.quantizer]
    while todo:
        for user in todo.pop().users:
            if user not in reached and (user.target in MOVERS or user.target is PER_TENSOR):
                reached.add(user)
                todo.append(user)
    return [layer for layer in layers if layer.site.input in reached]
