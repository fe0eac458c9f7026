"""Scales and zero points of groups of weights, with about the least error of rounding.

Shapes: weights (R, G, B), R rows of G groups of B; importance likewise, how much the error of each
weight counts, 0 where the last group was filled up; scales and zero points (R, G).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

SHARES = tuple(1.0 - 0.025 * k for k in range(25))  # of a group's range that are tried, 1 first
REFINEMENTS = 3
CHUNK = 1 << 20  # weights looked at together: the search is in no hurry for memory
DECIBELS_PER_BIT = 20 * math.log10(2)
LEAST_GAIN_DB = 0.5  # of zero points, whose subtraction is not free either
SMALLEST_HALF = 2.0**-14  # below, float16 loses digits

Grid = tuple[Tensor, Tensor | None]  # scale (R, G) and zero point (R, G), int8


def in_groups(flat: Tensor, group: int) -> Tensor:
    """Rows (R, F) -> (R, G, B), the last group filled up with zeros.

    Example:
        >>> in_groups(torch.tensor([[1, 2, 3]]), 2)
        tensor([[[1, 2],
                 [3, 0]]])
    """
    size = group or flat.shape[1]
    return F.pad(flat, (0, -flat.shape[1] % size)).unflatten(1, (-1, size))


def symmetric_grid(weight: Tensor, importance: Tensor, low: int, high: int) -> Grid:
    """Scales without zero points: a clipping that is tried and found, then refined in turns.

    The integers for these scales, then the least-squares scales for these integers (Lloyd 1982):
    neither turn adds error.

    Example:
        >>> weight = torch.tensor([[[1.0, 1.1, -0.9, 1.0, 2.0]]])
        >>> symmetric_grid(weight, torch.ones(1, 1, 5), -1, 1)[0]
        tensor([[1.2000]])
    """
    widest = weight.abs().amax(2) / high  # (R, G)
    zeros = torch.zeros_like(widest)
    return _search(weight, importance, low, high, lambda share: (widest * share, zeros))[0], None


def affine_grid(weight: Tensor, importance: Tensor, low: int, high: int) -> Grid:
    """Scales and zero points, of ranges that hold 0, so that zeros stay zero.

    Example:
        >>> affine_grid(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.ones(1, 1, 4), -2, 1)
        (tensor([[1.]]), tensor([[-2]], dtype=torch.int8))
    """
    least, most = weight.amin(2).clamp(max=0), weight.amax(2).clamp(min=0)  # (R, G)

    def clipped(share: float) -> tuple[Tensor, Tensor]:
        scale = (most - least) * share / (high - low)
        zero = (low - least * share / _positive(scale)).round()
        return scale, zero.clamp(low, high)

    scale, zero = _search(weight, importance, low, high, clipped)
    return scale, zero.to(torch.int8)


def _search(
    weight: Tensor,
    importance: Tensor,
    low: int,
    high: int,
    clipped: Callable[[float], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    best, zeros = clipped(1.0)
    least = torch.full_like(best, torch.inf)

    def keep(scale: Tensor, zero: Tensor) -> None:
        nonlocal best, zeros, least
        error = _error(_rounded(weight, scale, zero, low, high), weight, importance)
        better = error < least
        best, zeros = torch.where(better, scale, best), torch.where(better, zero, zeros)
        least = torch.where(better, error, least)

    for share in SHARES:
        keep(*clipped(share))
    for _ in range(REFINEMENTS):
        integers = _integers(weight, best, zeros, low, high) - zeros[..., None]
        squares = (importance * integers.square()).sum(2)
        fitted = (importance * integers * weight).sum(2) / squares.clamp(min=1e-30)
        keep(torch.where((squares > 0) & (fitted > 0), fitted, best), zeros)
    return best, zeros


def _positive(scale: Tensor) -> Tensor:
    """A group of zeros has no scale of its own; any other will do."""
    return torch.where(scale > 0, scale, 1.0)


def _integers(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    steps = torch.round(weight / _positive(scale)[..., None])
    return steps.add_(zero[..., None]).clamp_(low, high)


def _rounded(weight: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    made = _integers(weight, scale, zero, low, high)
    return made.sub_(zero[..., None]).mul_(scale[..., None])


def _error(made: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
    """Of each group (R, G)."""
    return made.sub_(weight).square_().mul_(importance).sum(2)


def as_half(scale: Tensor) -> Tensor:
    """Scales as float16 can hold them, in float32, where none of them is too small or large.

    A file then takes two bytes for each.
    """
    used = _positive(scale)
    fits = float(used.min()) >= SMALLEST_HALF and float(used.max()) <= torch.finfo(torch.half).max
    return scale.half().float() if fits else scale


def choose_grid(
    flat: Tensor,
    group: int,
    low: int,
    high: int,
    importance: Tensor | None = None,
    zero_point: bool | None = None,
) -> Grid:
    """Scales, and zero points where they are asked for or pay, of rows (R, F).

    Left to measurement (``zero_point=None``), zero points are taken where they lower the error by
    half a decibel more than their bits would if the weights had them: a bit is worth 6 dB.

    Args:
        importance: (R, F), how much the error of each weight counts; all alike by default.

    Example:
        >>> lopsided = torch.rand(4, 64) + 0.1
        >>> choose_grid(lopsided, 32, -8, 7)[1] is None, choose_grid(lopsided - 0.6, 32, -8, 7)[1]
        (False, None)
    """
    weighting = torch.ones_like(flat[:1]).expand_as(flat) if importance is None else importance
    made: dict[bool, Grid] = {}
    errors: dict[bool, float] = {}
    for affine in (False, True) if zero_point is None else (zero_point,):
        search = affine_grid if affine else symmetric_grid
        made[affine], errors[affine] = _by_chunks(search, flat, group, weighting, low, high)
    if zero_point is not None:
        return made[zero_point]
    bits = (high - low).bit_length() / (group or flat.shape[1])  # of zero points, for each weight
    gain = 10 * math.log10(max(errors[False], 1e-30) / max(errors[True], 1e-30))
    return made[gain > LEAST_GAIN_DB + DECIBELS_PER_BIT * bits]


def _by_chunks(
    search: Callable[[Tensor, Tensor, int, int], Grid],
    flat: Tensor,
    group: int,
    importance: Tensor,
    low: int,
    high: int,
) -> tuple[Grid, float]:
    """Some rows at a time: the grid, and the error that is left."""
    grids, error = [], 0.0
    count = max(1, CHUNK // flat.shape[1])
    for part, counts in zip(flat.split(count), importance.split(count), strict=True):
        weight, places = in_groups(part, group), in_groups(counts, group)
        scale, zero = search(weight, places, low, high)
        zeros = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        error += float(_error(_rounded(weight, scale, zeros, low, high), weight, places).sum())
        grids.append((scale, zero))
    scales = torch.cat([scale for scale, _ in grids])
    zero_points = [zero for _, zero in grids if zero is not None]
    scales = torch.where(scales > 0, scales, scales.amax().clamp(min=SMALLEST_HALF))
    return (as_half(scales), torch.cat(zero_points) if zero_points else None), error
