"""Weights with a symmetric scale for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.graph.quantized.rounding import levels, on_grid, round_to_grid, spread
from paredown.graph.rows import rows


@torch.library.custom_op("paredown::fake_quantize_channel", mutates_args=())
def fake_quantize_channel(x: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Tensor:
    """One scale (C,) for each index of dimension ``axis``, symmetric; shape kept.

    Example:
        >>> scale = torch.tensor([0.1, 0.2])
        >>> fake_quantize_channel(torch.tensor([[0.26], [0.26]]), scale, 0, -8, 7)
        tensor([[0.3000],
                [0.2000]])
    """
    return on_grid(x, spread(scale, x, axis), 0, low, high)


@fake_quantize_channel.register_fake
def _(x: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _save_inside(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, axis, low, high = inputs
    ctx.save_for_backward(round_to_grid(x, spread(scale, x, axis), 0, low, high)[1])


def _straight_through(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None


fake_quantize_channel.register_autograd(_straight_through, setup_context=_save_inside)

PER_CHANNEL = torch.ops.paredown.fake_quantize_channel.default


def integers(weight: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Tensor:
    """The integers that `fake_quantize_channel` rounds to, as int8 rows (C, F).

    Example:
        >>> integers(torch.tensor([[0.1, 0.2, -9.0]]), torch.tensor([0.1]), 0, -8, 7)
        tensor([[ 1,  2, -8]], dtype=torch.int8)
    """
    return rows(levels(weight, spread(scale, weight, axis), 0, low, high), axis).to(torch.int8)
