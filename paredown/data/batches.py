"""What is done to a batch: count, move, split and pad it, and call a model on it."""

from __future__ import annotations

from typing import Any

import torch

from paredown.data import splits
from paredown.graph import structure
from paredown.graph.model import Model


def call(model: Model, inputs: Any) -> Any:
    args, kwargs = splits.arguments(inputs)
    return model(*args, **kwargs)


def count(batch: Any) -> int:
    """How many examples it holds.

    Example:
        >>> count(({"x": torch.zeros(3, 2)}, torch.zeros(3)))
        3
    """
    return len(structure.flatten(batch)[0][0])


def to(batch: Any, device: torch.device) -> Any:
    leaves, nesting = structure.flatten(batch)
    return structure.unflatten([leaf.to(device, non_blocking=True) for leaf in leaves], nesting)


def chunks(batch: Any, size: int) -> list[Any]:
    """Parts of at most ``size`` examples, of sizes that differ by one at most.

    Example:
        >>> [count(part) for part in chunks((torch.zeros(7, 2), torch.zeros(7)), 3)]
        [3, 2, 2]
    """
    parts = -(-count(batch) // size)
    if parts == 1:
        return [batch]
    leaves, nesting = structure.flatten(batch)
    split = [leaf.tensor_split(parts) for leaf in leaves]
    return [structure.unflatten(list(row), nesting) for row in zip(*split, strict=True)]


def padded(batch: Any, size: int) -> Any:
    """The batch with its last example repeated up to ``size``.

    Example:
        >>> padded(torch.tensor([1, 2]), 4)
        tensor([1, 2, 2, 2])
    """
    leaves, nesting = structure.flatten(batch)
    if not leaves or len(leaves[0]) == size:
        return batch
    chosen = torch.arange(size).clamp(max=len(leaves[0]) - 1)
    return structure.unflatten([leaf[chosen] for leaf in leaves], nesting)


def per_epoch(examples: int, batch: int, fixed: int | None) -> int:
    """Batches of an epoch; a last one that is a single example has no variance to normalise by.

    Example:
        >>> per_epoch(97, 16, None), per_epoch(98, 16, None), per_epoch(98, 16, 16)
        (6, 7, 6)
    """
    full, rest = divmod(examples, batch)
    return full + (0 if fixed or (rest == 1 and full) else bool(rest))
