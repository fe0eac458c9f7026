"""Scales of integer grids: for a range, for a weight's channels, and for biases of 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255  # the largest activation, as an unsigned byte
SMALLEST_SCALE = 1e-12
WEIGHT_GRIDS = {8: (-127, 127), 4: (-8, 7)}  # bits -> lowest and highest integer
CLIPPINGS = 20  # shares of the largest weight that are tried,
LEAST_CLIPPING = 0.3  # from this one up to 1
REFINEMENTS = 4


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
    return (weight.abs().amax(others) / high).clamp(min=SMALLEST_SCALE)


def closest_scales(weight: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Symmetric scales (C,) with about the least squared error of each channel's rounding.

    The best of some clippings of the largest weight, then in turns the integers for these scales
    and the least-squares scales for these integers (Lloyd 1982): neither turn adds error. It pays
    at 4 bits and fewer, where the largest weight alone would leave the others few levels.

    Example:
        >>> weight = torch.tensor([[1.0, 1.1, -0.9, 1.0, 2.0]])
        >>> channel_scales(weight, 0, high=1), closest_scales(weight, 0, low=-1, high=1)
        (tensor([2.]), tensor([1.2000]))
    """
    rows = weight.movedim(axis, 0).flatten(1)  # (C, N)
    largest = channel_scales(weight, axis, high)  # (C,)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(LEAST_CLIPPING, 1, CLIPPINGS):
        scales = (largest * share).clamp(min=SMALLEST_SCALE)
        integers = (rows / scales[:, None]).round().clamp(low, high)
        error = (integers * scales[:, None] - rows).square().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    for _ in range(REFINEMENTS):
        integers = (rows / best[:, None]).round().clamp(low, high)
        squares = integers.square().sum(1)
        fitted = (rows * integers).sum(1) / squares.clamp(min=1)
        best = torch.where(squares > 0, fitted.clamp(min=SMALLEST_SCALE), best)
    return best


def least_scales(bias: Tensor, input_scale: float) -> Tensor:
    """The weight scales (C,) from which on each bias (C,) fits 32 bits at the product of scales.

    Example:
        >>> least_scales(torch.tensor([1.0, -4.0]), 0.5)
        tensor([1.8626e-09, 7.4506e-09])
    """
    return bias.detach().abs().float() / (input_scale * 2**30)
