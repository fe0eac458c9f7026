"""Scales of integer grids: for a range, for a weight's channels, and for biases of 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.graph.quantized.group_scales import in_groups, symmetric_grid

LEVELS = 255  # the largest activation, as an unsigned byte
SMALLEST_SCALE = 1e-12


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that map [low, high], widened to hold 0, onto 0..255.

    Zero is exact, so that padding and ReLU add no error (Jacob et al. 1712.05877).

    Example:
        >>> scale, zero_point = affine(-0.5, 0.75)
        >>> round(scale, 5), zero_point
        (0.0049, 102)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS, SMALLEST_SCALE)
    return scale, min(LEVELS, max(0, round(-low / scale)))


def channel_scales(weight: Tensor, axis: int, high: int = 127) -> Tensor:
    """Symmetric scales (C,) that map each output channel's largest weight to ``high``.

    Example:
        >>> channel_scales(torch.tensor([[1.27, -0.5], [0.0, -2.54]]), 0)
        tensor([0.0100, 0.0200])
    """
    others = [dim for dim in range(weight.dim()) if dim != axis]
    largest = torch.maximum(weight.amax(others), -weight.amin(others))
    return (largest / high).clamp(min=SMALLEST_SCALE)


def closest_scales(weight: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Symmetric scales (C,) with about the least squared error of each channel's rounding.

    It pays at 4 bits and fewer, where the largest weight alone would leave the others few levels.

    Example:
        >>> weight = torch.tensor([[1.0, 1.1, -0.9, 1.0, 2.0]])
        >>> channel_scales(weight, 0, high=1), closest_scales(weight, 0, low=-1, high=1)
        (tensor([2.]), tensor([1.2000]))
    """
    groups = in_groups(weight.movedim(axis, 0).flatten(1), 0)  # (C, 1, N)
    scales, _ = symmetric_grid(groups, torch.ones_like(groups[:1]).expand_as(groups), low, high)
    return scales[:, 0].clamp(min=SMALLEST_SCALE)


def least_scales(bias: Tensor, input_scale: float) -> Tensor:
    """The weight scales (C,) from which on each bias (C,) fits 32 bits at the product of scales.

    Example:
        >>> least_scales(torch.tensor([1.0, -4.0]), 0.5)
        tensor([1.8626e-09, 7.4506e-09])
    """
    return bias.detach().abs().float() / (input_scale * 2**30)
