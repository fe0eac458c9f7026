"""Weights with a scale for each output channel, or for each group of a channel's weights.

A weight is seen as rows (R, F): one for each output channel, holding all that makes the channel.
Each run of ``group`` weights of a row has a scale and, if asymmetric, a zero point; the last run
is shorter where ``group`` does not divide F. A group of 0 is the whole row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paredown.graph.rows import from_rows, rows

CHUNK = 1 << 20  # weights that are rounded at once


def spread(values: Tensor, group: int, features: int) -> Tensor:
    """A value for each group (R, G) -> for each weight (R, F).

    Example:
        >>> spread(torch.tensor([[1, 2]]), 3, 5)
        tensor([[1, 1, 1, 2, 2]])
    """
    if values.shape[1] == 1:
        return values.expand(-1, features)
    return values.repeat_interleave(group, 1)[:, :features]


def _steps(
    flat: Tensor, scale: Tensor, zero_point: Tensor | None, group: int, low: int, high: int
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows (R, F) at a time: which, and their numbers of grid steps, whole, in float."""
    features = flat.shape[1]
    count = max(1, CHUNK // max(1, features))
    for start in range(0, len(flat), count):
        part = slice(start, start + count)
        steps = (flat[part] / spread(scale[part], group, features)).round_()
        if zero_point is not None:
            steps = steps + spread(zero_point[part], group, features)
        yield part, steps.clamp_(low, high)


def integers(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int,
    group: int,
    low: int,
    high: int,
) -> Tensor:
    """The integers that `fake_quantize_group` rounds to, as int8 rows (R, F).

    Example:
        >>> integers(torch.tensor([[0.1, 0.2, -9.0]]), torch.tensor([[0.1]]), None, 0, 0, -8, 7)
        tensor([[ 1,  2, -8]], dtype=torch.int8)
    """
    flat = rows(weight.detach(), axis)
    made = torch.empty_like(flat, dtype=torch.int8)
    for part, steps in _steps(flat, scale, zero_point, group, low, high):
        made[part] = steps
    return made


@torch.library.custom_op("paredown::fake_quantize_group", mutates_args=())
def fake_quantize_group(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int,
    group: int,
    low: int,
    high: int,
) -> Tensor:
    """``scale * (clamp(round(w / scale) + zero_point, low, high) - zero_point)`` with a scale and
    a zero point (R, G) for each group of each output channel; the weight's shape is kept.

    Example:
        >>> weight = torch.tensor([[0.11, 0.22, 0.8, 1.6]])
        >>> fake_quantize_group(weight, torch.tensor([[0.1, 0.8]]), None, 0, 2, -8, 7)
        tensor([[0.1000, 0.2000, 0.8000, 1.6000]])
    """
    flat = rows(weight, axis)
    made = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for part, steps in _steps(flat, scale, zero_point, group, low, high):
        if zero_point is not None:
            steps -= spread(zero_point[part], group, flat.shape[1])
        made[part] = steps.mul_(spread(scale[part], group, flat.shape[1]))
    return from_rows(made, weight, axis).contiguous()


@fake_quantize_group.register_fake
def _(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int,
    group: int,
    low: int,
    high: int,
) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _save_inside(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, scale, zero_point, axis, group, low, high = inputs
    flat = rows(weight, axis)
    steps = flat / spread(scale, group, flat.shape[1])
    if zero_point is not None:
        steps = steps + spread(zero_point, group, flat.shape[1])
    inside = (steps > low - 0.5) & (steps < high + 0.5)
    ctx.save_for_backward(from_rows(inside, weight, axis))


def _straight_through(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None, None, None


fake_quantize_group.register_autograd(_straight_through, setup_context=_save_inside)

PER_GROUP = torch.ops.paredown.fake_quantize_group.default
