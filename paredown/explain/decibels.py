"""Why rounding costs what it costs: the mathematics of the named causes, on tensors alone.

Each function gives decibels: by how much the error of the rounding that it looks at would fall if
the cause were gone. 3 dB are half of the error, 6 dB one bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_DB = 140.0


def falls_by(now: float, then: float) -> float:
    """From one error power to another, in decibels.

    Example:
        >>> falls_by(4.0, 1.0) == 2 * falls_by(2.0, 1.0), falls_by(0.0, 0.0), falls_by(1.0, 0.0)
        (True, 0.0, 140.0)
    """
    if now <= 0:
        return 0.0
    return MOST_DB if then <= 0 else max(-MOST_DB, min(MOST_DB, 10 * math.log10(now / then)))


def shared_scale(spans: Tensor) -> float:
    """What parts pay on average for one scale, beside a scale of their own for each.

    The error of rounding goes with the square of the scale, so one part with a wide range costs all
    others levels (Nagel 1906.04721, section 3; Xiao 2211.10438).

    Args:
        spans: (K,) widths of the ranges of the parts; those that are always 0 do not count.

    Example:
        >>> round(shared_scale(torch.tensor([1.0, 1.0, 1.0]))), round(
        ...     shared_scale(torch.tensor([100.0, 1.0, 1.0, 1.0, 0.0])))
        (0, 30)
    """
    found = spans[spans > 0].double()
    return float(20 * torch.log10(found.max() / found).mean()) if len(found) else 0.0


def channel_spans(low: Tensor, high: Tensor) -> Tensor:
    """Widths (C,) of the ranges low..high (C,), widened to hold 0 as every range of integers is.

    Example:
        >>> channel_spans(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 5.0]))
        tensor([4., 5.])
    """
    return high.clamp(min=0) - low.clamp(max=0)


def largest_weights(weight: Tensor, axis: int) -> Tensor:
    """The largest size (C,) of a weight in each output channel.

    Example:
        >>> largest_weights(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), 0)
        tensor([2., 3.])
    """
    return weight.detach().float().movedim(axis, 0).flatten(1).abs().amax(1)


def outlying_weights(weight: Tensor, axis: int) -> float:
    """How far the largest weight of a channel is above the median one, zeros aside, on average.

    The scale follows the largest: 42 dB leave one of 127 levels to the median weight. Normal
    weights have about 13 dB.

    Example:
        >>> weight = torch.ones(4, 320)
        >>> weight[:, 7] = 100.0
        >>> outlying_weights(torch.ones(4, 320), 0), outlying_weights(weight, 0)
        (0.0, 40.0)
    """
    rows = weight.detach().double().movedim(axis, 0).flatten(1).abs()  # (C, N)
    median = torch.where(rows > 0, rows, torch.nan).nanmedian(1).values
    ratios = 20 * torch.log10(rows.amax(1) / median)
    return float(ratios[ratios.isfinite()].mean().nan_to_num())


def held_scale(weight: Tensor, scale: Tensor, axis: int, top: int) -> float:
    """What weights pay for a scale above the one that maps the largest of a channel to ``top``.

    A bias of 32 bits at input scale times weight scale holds the weight scale up where the bias is
    large and the input small (Jacob et al. 1712.05877, section 2.4).

    Shapes: scale (C,), one for each index of dimension ``axis`` of the weight.

    Example:
        >>> weight = torch.tensor([[1.27, 0.4], [1.0, -1.27]])
        >>> round(held_scale(weight, torch.tensor([0.01, 0.04]), 0, 127))
        9
    """
    own = largest_weights(weight, axis).double() / top
    return falls_by(float(scale.double().square().sum()), float(own.square().sum()))


def constant_channels(low: Tensor, high: Tensor) -> Tensor:
    """Which channels gave the same value at every place of every example, bool (C,).

    Example:
        >>> constant_channels(torch.tensor([0.0, -1.0]), torch.tensor([0.0, 2.0]))
        tensor([ True, False])
    """
    return low == high


def closest_range(
    counts: Tensor, edges: Tensor, rounding: float, span: float
) -> tuple[float, float, float]:
    """The range with the least error of rounding and clipping: that error, its low and high end.

    Args:
        counts: (B,) how many values lie in each bin.
        edges: (B + 1,) of the bins.
        rounding: mean squared error of the values that a range of width ``span`` does not clip.

    Example:
        >>> counts, edges = torch.zeros(100), torch.linspace(0, 100, 101)
        >>> counts[0], counts[99] = 1e6, 1.0
        >>> error, low, high = closest_range(counts, edges, 100**2 / 255**2 / 12, 100.0)
        >>> round(low), round(high), error < 100**2 / 255**2 / 12
        (0, 44, True)
    """
    centres = ((edges[:-1] + edges[1:]) / 2).double()  # (B,)
    shares = counts.double() / counts.sum()
    low, high = min(float(edges[0]), 0.0), max(float(edges[-1]), 0.0)
    shrink = [1.0 - 0.02 * step for step in range(50)]
    tried = [(low * f, high * f) for f in shrink]
    tried += [(low, high * f) for f in shrink] + [(low * f, high) for f in shrink]
    best = (math.inf, low, high)
    for a, b in tried:
        clipped = (shares * (centres - centres.clamp(a, b)).square()).sum()
        error = float(clipped) + rounding * ((b - a) / span) ** 2
        if error < best[0]:
            best = (error, a, b)
    return best
