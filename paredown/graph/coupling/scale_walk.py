"""The walk that follows the scale of channels through a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from paredown.graph.coupling.labels import PINNED, Labels
from paredown.graph.sites import Site, readers, sites
from paredown.graph.state import tensor_of


@dataclass(frozen=True)
class Part:
    """A parameter, and the label of each of its elements in an array that broadcasts to it."""

    name: str
    labels: np.ndarray


@dataclass(frozen=True)
class Reader:
    """A layer, the labels (I,) of its input's channels, and those of its weight's elements."""

    site: Site
    channels: np.ndarray
    part: Part


@dataclass(frozen=True)
class Exchange:
    """Labels 1 ... ``count`` - 1, each a channel that ``makers`` make and ``readers`` read.

    Label 0 stands for all that must stay as it is.
    """

    count: int
    makers: tuple[Part, ...]
    readers: tuple[Reader, ...]


class Walk:
    """What a walk over a graph has found so far, and the moves that rules are made of.

    A value is a tensor of labels in the value's shape, with stride 0 where they do not vary; None
    where all are pinned.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        self.sites: dict[fx.Node, list[Site]] = {}
        for site in sites(graph):
            self.sites.setdefault(site.node, []).append(site)
        self._labels = Labels()
        self._makers: list[Part] = []
        self._readers: list[Reader] = []
        self._read = readers(graph)

    def pin(self, node: fx.Node) -> None:
        """Whatever makes this value must make it as it is."""
        value = self.values.get(node)
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(each, Tensor):
                self._labels.union(_compact(each), np.array(PINNED))

    def tie(self, first: Tensor, second: Tensor) -> Tensor:
        """Two values that must have the same factors; the shapes broadcast."""
        first, second = torch.broadcast_tensors(first, second)
        shared = [a == b == 0 for a, b in zip(first.stride(), second.stride(), strict=True)]
        self._labels.union(_compact(first, shared), _compact(second, shared))
        return first

    def free(self, value: Tensor | None) -> bool:
        """Whether any of its factors can be moved still."""
        return value is not None and bool(self._labels.find(_compact(value)).any())

    def along(self, value: Tensor, axes: Iterable[int]) -> Tensor | None:
        """The labels along ``axes``, where they do not vary along the other ones; else None."""
        kept = {axis % value.dim() for axis in axes}
        first = value
        for axis in set(range(value.dim())) - kept:
            first = first.narrow(axis, 0, min(1, value.shape[axis]))
        if not value.numel():
            return None
        roots = torch.from_numpy(self._labels.find(value.numpy()))
        if not bool((roots == torch.from_numpy(self._labels.find(first.numpy()))).all()):
            return None
        return first.reshape([value.shape[axis] for axis in sorted(kept)])

    def fresh(self, shape: Iterable[int]) -> Tensor:
        return torch.from_numpy(self._labels.fresh(*shape))

    def alone(self, name: str | None) -> bool:
        """Whether one op reads the parameter, under this name or a tied one."""
        return name is None or len(self._read[id(tensor_of(self.graph, name))]) == 1

    def make(self, name: str, labels: Tensor) -> None:
        self._makers.append(Part(name, labels.numpy()))

    def read(self, site: Site, channels: Tensor, labels: Tensor) -> None:
        part = Part(site.weight, labels.numpy())
        self._readers.append(Reader(site, channels.numpy(), part))

    def found(self) -> Exchange:
        """What has both makers and readers, under labels without gaps."""
        made = self._roots(part.labels for part in self._makers)
        read = self._roots(reader.channels for reader in self._readers)
        kept = np.setdiff1d(np.intersect1d(made, read), [PINNED])
        numbers = np.zeros(self._labels.count, dtype=np.int64)
        numbers[kept] = np.arange(1, len(kept) + 1)
        makers = [Part(p.name, numbers[self._labels.find(p.labels)]) for p in self._makers]
        readers = [
            Reader(
                each.site,
                numbers[self._labels.find(each.channels)],
                Part(each.part.name, numbers[self._labels.find(each.part.labels)]),
            )
            for each in self._readers
        ]
        return Exchange(
            len(kept) + 1,
            tuple(part for part in makers if part.labels.any()),
            tuple(reader for reader in readers if reader.channels.any()),
        )

    def _roots(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        every = [self._labels.find(np.unique(labels)) for labels in arrays]
        return np.unique(np.concatenate(every)) if every else np.zeros(0, dtype=np.int64)


def _compact(value: Tensor, shared: list[bool] | None = None) -> np.ndarray:
    """Without the repetitions along axes of stride 0."""
    for axis in range(value.dim()):
        if value.stride(axis) == 0 and (shared is None or shared[axis]) and value.shape[axis]:
            value = value.narrow(axis, 0, 1)
    return value.numpy()
