"""k-means: exact and quick for numbers, which can be sorted, and for short blocks of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 300  # of Lloyd's algorithm on a line, which ends where nothing moves any more
BLOCK_ROUNDS = 30
SPLITS = 8  # times that values without members are put where they help most
CHUNK = 1 << 22  # distances in memory at a time


# --- on a line -------------------------------------------------------------------------------


def cluster_line(values: Tensor, k: int, counts: Tensor | None = None) -> Tensor:
    """At most ``k`` centroids of numbers, ascending, from evenly spaced ones between the least and
    the largest (linear initialisation; Deep Compression, arXiv 1510.00149, section 3.3).

    Numbers are sorted once. A step of Lloyd's algorithm then needs the sums between k - 1 places
    alone, which sums of prefixes give: O(k log n). Where no number is nearest to a centroid, it
    goes into the cluster with the largest error. At most ``k`` distinct numbers are their own
    centroids; of no numbers it is 0.

    Args:
        counts: how much each number counts; all alike by default.

    Shapes: values (N,), counts (N,) -> (at most k,) float64.

    Example:
        >>> cluster_line(torch.tensor([1.0, 9.0, 2.0, 1.5, 8.0]), 2)
        tensor([1.5000, 8.5000], dtype=torch.float64)
    """
    x, order = values.double().sort()
    distinct = torch.unique_consecutive(x)
    if len(distinct) <= k:
        return distinct if len(distinct) else x.new_zeros(1)
    weight = torch.ones_like(x) if counts is None else counts.double()[order]
    sums = torch.stack([_prefixes(weight * x**power) for power in range(3)])  # (3, N + 1)
    centroids = torch.linspace(float(x[0]), float(x[-1]), k, dtype=torch.float64)
    for _ in range(SPLITS):
        centroids, moments = _lloyd(x, sums, centroids)
        missing = k - int((moments[0] > 0).sum())
        if not missing:
            break
        centroids = _refilled(x, sums, centroids, moments, missing)
    centroids, moments = _lloyd(x, sums, centroids)
    return centroids[moments[0] > 0]


def _prefixes(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _bounds(x: Tensor, centroids: Tensor) -> Tensor:
    """(k + 1,) where each centroid's numbers begin in the sorted ones, and where all end."""
    inner = torch.searchsorted(x, (centroids[1:] + centroids[:-1]) / 2)
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(x))])


def _lloyd(x: Tensor, sums: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Centroids that are the means of what is nearest to them; and the zeroth to second moments of
    their clusters, (3, k)."""
    for _ in range(ROUNDS):
        moments = sums[:, _bounds(x, centroids)].diff(dim=1)
        moved = torch.where(moments[0] > 0, moments[1] / moments[0], centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids, sums[:, _bounds(x, centroids)].diff(dim=1)


def _refilled(x: Tensor, sums: Tensor, centroids: Tensor, moments: Tensor, missing: int) -> Tensor:
    """Centroids without members go: the clusters of the largest error are cut in two for them."""
    kept = moments[0] > 0
    there, moments = centroids[kept], moments[:, kept]
    error = moments[2] - moments[1] ** 2 / moments[0]
    bounds = _bounds(x, there)
    worst = error.argsort(descending=True)[:missing]
    first, last = x[bounds[worst]], x[bounds[worst + 1] - 1]
    spread = first < last  # else it is one number, again and again
    halves = torch.cat([(there[worst] + first) / 2, (there[worst] + last) / 2])
    whole = torch.ones_like(there, dtype=torch.bool)
    whole[worst[spread]] = False
    return torch.cat([there[whole], halves[spread.repeat(2)]]).sort().values


def nearest(values: Tensor, centroids: Tensor) -> Tensor:
    """The number of the nearest of ascending centroids; of two as near, the lower.

    Shapes: values (...), centroids (k,) -> (...) int64.

    Example:
        >>> nearest(torch.tensor([[0.4, 0.6], [-9.0, 0.5]]), torch.tensor([0.0, 1.0]))
        tensor([[0, 1],
                [0, 0]])
    """
    return torch.bucketize(values.double(), (centroids[1:] + centroids[:-1]).double() / 2)


# --- of blocks -------------------------------------------------------------------------------


def cluster_blocks(blocks: Tensor, counts: Tensor, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """At most ``k`` codewords for blocks of numbers, and the codeword of each block: product
    quantization of weights (arXiv 1907.05686), each weight with the importance of its own.

    The error of a block is the sum of ``count * (number - codeword)^2``: a count of 0 leaves a
    number out, as those of pruned weights. A codeword without blocks takes the one of the largest
    error.

    Shapes: blocks and counts (N, d) -> codewords (k, d), codes (N,) int64.

    Example:
        >>> blocks = torch.tensor([[0.0, 1.0], [4.0, 4.0], [0.0, 3.0]])
        >>> codewords, codes = cluster_blocks(blocks, torch.ones(3, 2), 2)
        >>> codewords[codes].tolist()
        [[0.0, 2.0], [4.0, 4.0], [0.0, 2.0]]
    """
    distinct, codes = torch.unique(blocks, dim=0, return_inverse=True)
    if len(distinct) <= k:
        return distinct, codes
    generator = torch.Generator().manual_seed(seed)
    words = distinct[torch.randperm(len(distinct), generator=generator)[:k]]
    codes = torch.full((len(blocks),), -1)
    for _ in range(BLOCK_ROUNDS):
        found, errors = _nearest_words(blocks, counts, words)
        found = _fill_empty(found, errors, len(words))
        if torch.equal(found, codes):
            break
        codes = found
        words = _means(blocks, counts, codes, words)
    return words, codes


def _nearest_words(blocks: Tensor, counts: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """The codeword of least error of each block, and that error, (N,) each."""
    codes, errors = [], []
    size = max(1, CHUNK // len(words))
    for part, count in zip(blocks.split(size), counts.split(size), strict=True):
        far = torch.addmm(count @ (words * words).T, count * part, words.T, alpha=-2)  # (n, k)
        least = far.min(1)
        codes.append(least.indices)
        errors.append(least.values + (count * part * part).sum(1))
    return torch.cat(codes), torch.cat(errors)


def _fill_empty(codes: Tensor, errors: Tensor, k: int) -> Tensor:
    empty = (torch.bincount(codes, minlength=k) == 0).nonzero().flatten()
    if len(empty):
        worst = errors.argsort(descending=True, stable=True)[: len(empty)]
        codes[worst] = empty[: len(worst)]
    return codes


def _means(blocks: Tensor, counts: Tensor, codes: Tensor, words: Tensor) -> Tensor:
    total = torch.zeros_like(words).index_add_(0, codes, counts * blocks)
    weight = torch.zeros_like(words).index_add_(0, codes, counts)
    return torch.where(weight > 0, total / weight.clamp(min=1e-30), words)
