"""Labels for the indices of tensor dimensions, and the values of a graph that carry them.

Indices with one label are cut together. Label 0 is pinned: what carries it is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, fx

PINNED = 0


class Labels:
    """Disjoint sets of labels, in arrays: near-linear in the number of labels.

    Example:
        >>> labels = Labels()
        >>> a, b = labels.fresh(3), labels.fresh(3)
        >>> labels.union(a, b[::-1])
        >>> bool((labels.find(a) == labels.find(b)[::-1]).all())
        True
    """

    def __init__(self) -> None:
        self._parents = np.zeros(1024, dtype=np.int64)
        self.count = 1

    def fresh(self, *shape: int) -> np.ndarray:
        """New labels, each in a set of its own."""
        number = math.prod(shape)
        while self.count + number > len(self._parents):
            self._parents = np.concatenate([self._parents, np.zeros_like(self._parents)])
        made = np.arange(self.count, self.count + number)
        self._parents[self.count : self.count + number] = made
        self.count += number
        return made.reshape(shape)

    def find(self, labels: np.ndarray) -> np.ndarray:
        """The least label of each set: its root."""
        roots = self._parents[labels]
        while True:
            above = self._parents[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parents[labels] = roots
        return roots

    def union(self, first: np.ndarray, second: np.ndarray) -> None:
        """Merge the sets of each pair; the arrays broadcast."""
        first, second = (a.ravel() for a in np.broadcast_arrays(first, second))
        while True:
            low, high = self.find(first), self.find(second)
            low, high = np.minimum(low, high), np.maximum(low, high)
            apart = low != high
            if not apart.any():
                return
            first, second = low[apart], high[apart]
            self._parents[second] = first  # of several for one root the last; the rest comes again


@dataclass(frozen=True)
class Block:
    """The labels of some axes, jointly: shape of ``labels`` = sizes of ``axes``, ascending.

    One axis: an index goes with its label. Several, after a view has split a dimension: each cell
    has a label, and which of the axes is cut is decided where an op needs them apart.
    """

    axes: tuple[int, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its shape, and the labels of its axes; other axes are pinned.

    ``constant``: made of parameters alone. No axis of size 1 is labelled.
    """

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    constant: bool = False

    def block(self, axis: int) -> Block | None:
        return next((block for block in self.blocks if axis in block.axes), None)

    def joint(self) -> list[Block]:
        return [block for block in self.blocks if len(block.axes) > 1]


Result = Value | list[Value] | None


@dataclass(frozen=True)
class Term:
    """Multiply-adds of an op: ``constant`` times the number of indices kept of each array."""

    constant: int
    labels: tuple[np.ndarray, ...]


class Walk:
    """What a walk over a graph has found so far, and the moves that rules are made of."""

    def __init__(self, attention: str, group_norm: str) -> None:
        self.attention, self.group_norm = attention, group_norm
        self.labels = Labels()
        self.values: dict[fx.Node, Result] = {}
        self.reduced: list[tuple[np.ndarray, str]] = []  # labels, the op that reduces over them
        self.parts: list[np.ndarray] = []  # labels of which one at least must stay
        self.pins: list[tuple[np.ndarray, str]] = []  # labels, why they are pinned
        self.terms: list[Term] = []
        self.joints: list[tuple[np.ndarray, frozenset[int]]] = []  # labels, dims never to be cut
        self.never_zero: set[tuple[fx.Node, int]] = set()  # a parameter, where zeros do not mask
        self.node: fx.Node | None = None  # the op being walked

    # --- values ------------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    def tensors(self, node: fx.Node) -> list[Value]:
        """The tensor operands, those in lists included."""
        found: list[Value] = []
        for source in node.all_input_nodes:
            value = self.values.get(source)
            found += value if isinstance(value, list) else [value] if value is not None else []
        return found

    def fresh(self, shape: Sequence[int], axes: Iterable[int], constant: bool = False) -> Value:
        """A value with new labels on these axes."""
        blocks = tuple(Block((a,), self.labels.fresh(shape[a])) for a in axes if shape[a] > 1)
        return Value(tuple(shape), blocks, constant)

    def made(self, shape: Sequence[int], blocks: Iterable[Block], constant: bool = False) -> Value:
        """A value with these blocks; axes of size 1, pinned ones and ones all alike drop out."""
        kept = [simple for block in blocks if (simple := self._simple(block)) is not None]
        value = Value(tuple(shape), tuple(sorted(kept, key=lambda b: b.axes)), constant)
        self.joints += [(block.labels, frozenset()) for block in value.joint()]
        return value

    def _simple(self, block: Block) -> Block | None:
        """Without the axes along which the labels are the same."""
        roots = self.labels.find(block.labels)
        if roots.size and not roots.any():
            return None
        varying = [d for d in range(roots.ndim) if not (roots == roots.take([0], d)).all(axis=None)]
        if not varying:
            if roots.size > 1:
                self.pin(roots, "its whole dimension would go at once")
            return None
        index = tuple(slice(None) if d in varying else 0 for d in range(roots.ndim))
        return Block(tuple(block.axes[d] for d in varying), block.labels[index])

    # --- moves -------------------------------------------------------------------------------

    def pin(self, labels: np.ndarray, why: str = "") -> None:
        free = labels[self.labels.find(labels) != PINNED]
        if free.size:
            self.pins.append((free, why or self.where()))
            self.labels.union(free, np.int64(PINNED))  # type: ignore[arg-type]

    def where(self) -> str:
        return f"{self.node.name} ({self.node.target})" if self.node is not None else ""

    def pin_axes(self, value: Value, axes: Iterable[int], why: str = "") -> Value:
        """These axes are never cut; a joint block goes on with its other axes."""
        for axis in axes:
            block = value.block(axis)
            if block is None:
                continue
            if len(block.axes) == 1:
                self.pin(block.labels, why)
                value = without(value, block)
            else:
                value = self.apart(value, block, next(a for a in block.axes if a != axis))
        return value

    def fix(self, block: Block, axis: int, part: slice) -> None:
        """This part of the axis must stay; a joint block is then cut along another axis."""
        if len(block.axes) == 1:
            self.pin(block.labels[part])
        else:
            self.joints.append((block.labels, frozenset({block.axes.index(axis)})))

    def pin_all(self, values: Iterable[Value], why: str = "") -> None:
        for value in values:
            for block in value.blocks:
                self.pin(block.labels, why)

    def apart(self, value: Value, block: Block, carrier: int) -> Value:
        """A joint block becomes one axis: what is cut is cut from ``carrier`` alone."""
        labels = self.merge(block.labels, block.axes.index(carrier))
        blocks = [b for b in value.blocks if b is not block]
        simple = self._simple(Block((carrier,), labels))
        return replace(value, blocks=(*blocks, *([simple] if simple else [])))

    def merge(self, labels: np.ndarray, dim: int) -> np.ndarray:
        """Labels that differ along ``dim`` alone: the others become one each, (size of dim,)."""
        rows = np.moveaxis(labels, dim, 0).reshape(labels.shape[dim], -1)
        self.labels.union(rows, rows[:, :1])
        return rows[:, 0]

    def separate(self, value: Value, avoid: Iterable[int] = (), only: Iterable[int] = ()) -> Value:
        """No joint blocks any more (those that touch ``only``, where given).

        The carrier is the leading axis, the heads, or the trailing one where the policy is
        "head_dim"; axes in ``avoid`` (the contracted, the normalised) only where all are.
        """
        wanted, shunned = set(only), set(avoid)
        for block in value.joint():
            if wanted and not wanted & set(block.axes):
                continue
            good = [a for a in block.axes if a not in shunned]
            if self.attention == "head_dim":
                value = self.apart(value, block, block.axes[-1])
            else:
                value = self.apart(value, block, (good or block.axes)[0])
        return value

    def axis(self, value: Value, axis: int) -> np.ndarray | None:
        """The labels of one axis, which must be in no joint block; None where it is pinned."""
        block = value.block(axis % max(1, len(value.shape)))
        if block is None:
            return None
        assert len(block.axes) == 1, f"{self.where()}: axis {axis} is not apart"
        return block.labels

    def tie(self, *labels: np.ndarray | None) -> np.ndarray | None:
        """The same dimension, seen from several tensors; pinned where one of them is."""
        given = [each for each in labels if each is not None]
        if not given:
            return None
        for other in given[1:]:
            self.labels.union(given[0], other)
        if len(given) < len(labels):
            self.pin(given[0])
            return None
        return given[0]

    def reduce(self, labels: np.ndarray | None) -> None:
        """An op sees how many indices there are: setting some to zero is not removing them."""
        if labels is not None:
            self.reduced.append((labels, self.where()))

    def count(self, constant: int, *labels: np.ndarray | None, sizes: Sequence[int] = ()) -> None:
        """Multiply-adds: the product of constant, and of sizes or their kept labels."""
        given = []
        for size, each in zip(sizes, labels, strict=True):
            if each is None:
                constant *= size
            else:
                given.append(each)
        self.terms.append(Term(constant, tuple(given)))

    # --- the end -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Each joint block that no op took apart is cut along the axis that leaves most to cut.

        Those with an axis that must stay come first: they have the least choice.
        """
        for labels, fixed in sorted(self.joints, key=lambda joint: not joint[1]):
            roots = self.labels.find(labels)
            varying = [d for d in range(roots.ndim) if not (roots == roots.take([0], d)).all()]
            allowed = [d for d in varying if d not in fixed]
            if len(varying) == 1 and allowed:
                continue
            if not varying:
                continue
            if not allowed:
                self.pin(roots, "its axes cannot be cut apart")
                continue
            best = max(allowed, key=lambda d: (self._left(roots, d), -d))
            self.merge(roots, best)

    def _left(self, roots: np.ndarray, dim: int) -> int:
        """How many sets there would be besides the pinned one, merged along the other axes."""
        _, small = np.unique(np.append(roots.ravel(), PINNED), return_inverse=True)
        trial = Labels()
        trial.fresh(int(small.max()))
        rows = np.moveaxis(small[:-1].reshape(roots.shape), dim, 0).reshape(roots.shape[dim], -1)
        trial.union(rows, rows[:, :1])
        found = np.unique(trial.find(rows))
        return int((found != PINNED).sum())


def without(value: Value, block: Block) -> Value:
    return replace(value, blocks=tuple(b for b in value.blocks if b is not block))


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """A shape in plain numbers: a dynamic size stands for its example's."""
    return tuple(int(s) if isinstance(s, int) else int(s.node.hint) for s in tensor.shape)
