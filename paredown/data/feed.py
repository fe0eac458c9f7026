"""The first examples of a split in batches that fit into memory, padded for a fixed batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

from paredown.core.task import Task
from paredown.data import batches, splits
from paredown.graph.model import Model
from paredown.graph.quantized.runner import Runner

MEMORY = 256 << 20  # bytes that the values of one batch may take in each graph


def batch_size(model: Model, task: Task) -> int:
    """Examples at a time so that the values of one batch fit into `MEMORY`."""
    if model.fixed_batch:
        return model.fixed_batch
    taken = 0

    def note(node: fx.Node, value: Any) -> None:
        nonlocal taken
        if node.op == "call_function" and isinstance(value, Tensor):
            taken += value.nbytes

    Runner(model.graph).outputs([item.example for item in model.inputs], note=note)
    examples = max([len(item.example) for item in model.inputs if 0 in item.dynamic], default=1)
    return max(1, min(task.batch_size, MEMORY * examples // max(1, taken)))


def examples(
    model: Model, task: Task, split: str, size: int, most: int | None
) -> Iterator[tuple[list[Tensor], Any, int]]:
    """Batches of the first ``most`` examples: inputs, target, and how many of them are not padding.

    Only a model of a fixed batch is padded. All inputs together take at most about `MEMORY`, so
    that they can be kept; None asks for the whole split, which may take more.
    """
    seen = taken = 0
    for inputs, target in splits.batches(splits.split(task, split), size):
        count = batches.count((inputs, target) if target is not None else inputs)
        if model.fixed_batch:
            inputs = batches.padded(inputs, size)
        leaves = model.bind(*splits.arguments(inputs))
        yield leaves, target, count
        seen += count
        taken += sum(leaf.nbytes for leaf in leaves)
        if most is not None and (seen >= most or taken >= MEMORY):
            return
