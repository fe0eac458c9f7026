"""From what a value took on to the range that its integers span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.data.observe import BINS, Statistics
from paredown.graph.quantized.scales import LEVELS, affine

Range = tuple[float, float]

POWER = 2.4  # of the error, in `lp_range`


def minmax_range(statistics: Statistics) -> Range:
    """Everything that was seen."""
    return statistics.low, statistics.high


def percentile_range(statistics: Statistics, percentile: float = 99.99) -> Range:
    """The central ``percentile`` of the values, the rest clipped evenly at both ends."""
    counts, edges = _histogram(statistics)
    cumulative = counts.cumsum(0) / counts.sum()
    tail = (1 - percentile / 100) / 2
    first = int(torch.searchsorted(cumulative, torch.tensor(tail), right=True))
    last = int(torch.searchsorted(cumulative, torch.tensor(1 - tail)))
    return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])


def lp_range(statistics: Statistics) -> Range:
    """The clipping with the least mean ``|error| ** POWER`` of rounding plus clipping.

    At 2 this is the squared error (Sung 1511.06488). A little more (as LAPQ 1911.07190 finds) keeps
    more of the large values, on which what comes after depends most.
    """
    counts, edges = _histogram(statistics)
    counts = _without_zeros(counts, edges)
    centres = (edges[:-1] + edges[1:]) / 2  # (BINS,)
    return min(_clippings(statistics), key=lambda r: _error(counts, centres, r))


def entropy_range(statistics: Statistics) -> Range:
    """The clipping whose rounded distribution has the least Kullback-Leibler divergence.

    As TensorRT's calibrator (Migacz, GTC 2017), for ranges with and without a negative side.
    """
    counts, edges = _histogram(statistics)
    counts = _without_zeros(counts, edges)
    return min(_clippings(statistics), key=lambda r: _divergence(counts, edges, r))


def _histogram(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Counts (BINS,) and bin edges (BINS + 1,)."""
    assert statistics.counts is not None
    edges = torch.linspace(statistics.histogram_low, statistics.histogram_high, BINS + 1)
    return statistics.counts, edges


def _clippings(statistics: Statistics) -> list[Range]:
    """Candidate ranges: each end shrunk on its own, 100 % first so that it wins ties."""
    shrink = [1.0 - 0.02 * k for k in range(40)]
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    both = [(low * f, high * f) for f in shrink]
    if low == 0.0 or high == 0.0 or abs(low) > abs(high) / 4:
        return both
    return both + [(low, high * f) for f in shrink]  # a short negative side, as of SiLU and GELU


def _error(counts: Tensor, centres: Tensor, clip: Range) -> float:
    scale, zero = affine(*clip)
    levels = (torch.round(centres / scale) + zero).clamp(0, LEVELS)
    inside = (levels > 0) & (levels < LEVELS)
    rounding = (scale / 2) ** POWER / (POWER + 1)  # the mean over a level
    clipping = ((levels - zero) * scale - centres).abs() ** POWER
    error = torch.where(inside, torch.tensor(rounding), clipping)
    return float((counts * error).sum())


def _without_zeros(counts: Tensor, edges: Tensor) -> Tensor:
    """Counts (BINS,) with no more in the bins that hold 0 than beside them.

    Zero is exact at any scale. Half of what leaves a ReLU is zero; taken for values that are
    rounded, it would ask for the finest level, and so for clipping all else.

    Example:
        >>> _without_zeros(torch.tensor([90.0, 6.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
        tensor([6., 6., 5.])
    """
    here = ((edges[:-1] <= 0) & (edges[1:] >= 0)).nonzero().flatten().tolist()
    if not here:
        return counts
    beside = [float(counts[n]) for n in (here[0] - 1, here[-1] + 1) if 0 <= n < len(counts)]
    made = counts.clone()
    made[here] = made[here].clamp(max=sum(beside) / len(beside))
    return made


def _divergence(counts: Tensor, edges: Tensor, clip: Range) -> float:
    """Divergence of p from q: p is what clipping leaves, the clipped counts in its end bins; q is
    what lay inside the range, the counts of each level spread over the bins of p that it holds.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    inside = ((centres >= clip[0]) & (centres <= clip[1])).nonzero().flatten()
    if not len(inside) or not bool(counts[inside].any()):
        return float("inf")
    first, last = int(inside[0]), int(inside[-1])
    kept = counts[first : last + 1]  # (K,)
    p = kept.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    scale, zero = affine(*clip)
    levels = (torch.round(centres[first : last + 1] / scale) + zero).clamp(0, LEVELS).long()
    total = torch.zeros(LEVELS + 1).index_add_(0, levels, kept)
    filled = torch.zeros(LEVELS + 1).index_add_(0, levels, (p > 0).float()).clamp(min=1)
    q = (total / filled)[levels] / kept.sum()
    p, seen = p / p.sum(), p > 0
    return float((p[seen] * torch.log(p[seen] / q[seen].clamp(min=1e-9))).sum())


@dataclass(frozen=True)
class RangeMethod:
    """A way to choose the range of a value, and what `paredown explain` tries after it.

    Attributes:
        choose: statistics of the value and the per cent of it to keep -> its range.
        narrower, wider: the methods to try where its ranges are too wide, and where they clip.
        histogram: whether it looks at more than the extremes.
    """

    choose: Callable[[Statistics, float], Range]
    narrower: str = "percentile"
    wider: str = "minmax"
    histogram: bool = True


LP = RangeMethod(lambda seen, _: lp_range(seen))
MINMAX = RangeMethod(lambda seen, _: minmax_range(seen), wider="lp", histogram=False)
PERCENTILE = RangeMethod(percentile_range, narrower="lp", wider="lp")
ENTROPY = RangeMethod(lambda seen, _: entropy_range(seen), narrower="lp", wider="lp")
