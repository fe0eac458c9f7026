"""How far one histogram lies from another: the population stability index, and Kolmogorov's
distance. Pure functions of counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

SMOOTHING = 0.5  # of an example, added to each bin: an empty one is rare, not impossible


@dataclass(frozen=True)
class Distance:
    """How far live data lie from the reference.

    Args:
        psi: the index, less what equal distributions give at these counts.
        spread: standard deviation of the index where the distributions are equal.
        ks: the largest difference of the cumulative shares.
        ks_chance: what that difference stays below in 999 of 1,000 equal ones.

    Example:
        >>> Distance(psi=0.3, spread=0.01, ks=0.2, ks_chance=0.06).beyond(0.2)
        True
    """

    psi: float
    spread: float
    ks: float
    ks_chance: float

    def beyond(self, limit: float) -> bool:
        """Whether the index lies above ``limit``, and above what chance gives with few examples."""
        return self.psi > max(limit, 3 * self.spread)


def distance(
    reference: ArrayLike, live: ArrayLike, reference_examples: int, live_examples: int
) -> Distance:
    """Compare two histograms (bins,), the bins in order.

    The index of two samples from one distribution is not zero: with ``n`` and ``m`` examples in
    ``B`` bins it is near ``chi2(B - 1) * (1/n + 1/m)`` (Yurdakul and Naranjo 2020, Journal of
    Risk Model Validation 14:4), so its mean, ``(B - 1) * (1/n + 1/m)``, is taken off. The counts
    may be of elements, which are not independent within an example: n and m are of examples,
    which takes off too much rather than too little.

    Raises:
        ValueError: the histograms differ in length, or one is empty.

    Example:
        >>> same = distance([50, 50], [500, 500], 100, 1000)
        >>> moved = distance([50, 50], [900, 100], 100, 1000)
        >>> round(same.psi, 3), round(moved.psi, 2), moved.ks
        (0.0, 0.87, 0.4)
    """
    before, after = np.asarray(reference, np.float64), np.asarray(live, np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"live: expected {before.shape} counts, got {after.shape}")
    if not (before.sum() > 0 and after.sum() > 0 and reference_examples > 0 and live_examples > 0):
        raise ValueError("reference, live: expected counts above 0, got an empty histogram")
    chance = 1 / reference_examples + 1 / live_examples
    p, q = _shares(before, reference_examples), _shares(after, live_examples)
    index = float(((q - p) * np.log(q / p)).sum())
    free = int(((before + after) > 0).sum()) - 1  # bins that both leave empty add nothing
    apart = np.abs(np.cumsum(before / before.sum()) - np.cumsum(after / after.sum()))
    return Distance(
        psi=max(0.0, index - free * chance),
        spread=math.sqrt(2 * max(free, 1)) * chance,
        ks=float(round(apart.max(), 12)),
        ks_chance=math.sqrt(-0.5 * math.log(0.001 / 2) * chance),
    )


def _shares(counts: NDArray[np.float64], examples: int) -> NDArray[np.float64]:
    scaled = counts / counts.sum() * examples + SMOOTHING
    return scaled / scaled.sum()
