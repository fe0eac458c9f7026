"""What a cut leaves of each dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.graph.coupling.labels import Value


class Cut:
    """What stays of every value of the graph: what the rules rewrite sizes by.

    Args:
        values: of each node by name, with labels as roots.
        alive: (labels,) bool, which roots stay.
    """

    def __init__(self, values: Mapping[str, Value | list[Value | None]], alive: np.ndarray) -> None:
        self._values, self._alive = values, alive

    def value(self, node: Any) -> Value:
        """The value as it was before the cut."""
        found = self._values[node.name]
        assert isinstance(found, Value)
        return found

    def parts(self, node: Any) -> list[Value]:
        """The values of an op that gives several."""
        found = self._values[node.name]
        assert isinstance(found, list)
        return [part for part in found if isinstance(part, Value)]

    def kept(self, node: Any, axis: int) -> np.ndarray | None:
        """(size,) bool: which indices of the axis stay; None where all do."""
        value = self.value(node)
        axis %= max(1, len(value.shape))
        block = value.block(axis)
        if block is None:
            return None
        alive = self._alive[block.labels]
        others = tuple(d for d in range(alive.ndim) if block.axes[d] != axis)
        kept = alive.any(others)
        if not kept.any():
            raise UserError(
                f"{node.name}: nothing would be left of its dimension {axis}; keep more units."
            )
        return None if kept.all() else kept

    def count(self, node: Any, axis: int) -> int | None:
        """How many indices stay; None where all do."""
        kept = self.kept(node, axis)
        return None if kept is None else int(kept.sum())

    def size(self, node: Any, axis: int) -> int:
        count = self.count(node, axis)
        return self.value(node).shape[axis] if count is None else count

    def whole_rows(self, node: Any, axis: int, rows: int) -> bool:
        """Whether the axis, seen as so many rows, keeps or loses each as a whole."""
        kept = self.kept(node, axis)
        if kept is None:
            return True
        table = kept.reshape(rows, -1)
        return bool((table == table[:, :1]).all())
