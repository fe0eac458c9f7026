"""A weight as rows, one for each index of an axis."""

from __future__ import annotations

from torch import Tensor


def rows(weight: Tensor, axis: int) -> Tensor:
    """The weight as (R, F), R being the size of its dimension ``axis``.

    Example:
        >>> import torch
        >>> rows(torch.arange(6).reshape(3, 2), 1)
        tensor([[0, 2, 4],
                [1, 3, 5]])
    """
    return weight.movedim(axis, 0).flatten(1)


def from_rows(made: Tensor, like: Tensor, axis: int) -> Tensor:
    """Rows (R, F) as a weight of the shape of ``like``; undoes `rows`."""
    return made.reshape(like.movedim(axis, 0).shape).movedim(0, axis)
