"""Latencies of two files: quantiles, and how many times faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paredown.core.speed import away_from_one, speed_change
from paredown.measure.stats import CHUNK, RESAMPLES, Floats, Interval, checked_scores, tail

# Binomial: the largest of n samples exceeds the true p99 with probability 1 - 0.99**n, and 459 is
# the first n where that is 99 %. With fewer, a "p99" may well lie above everything that was seen.
MIN_SAMPLES_P99 = 459


@dataclass(frozen=True)
class Quantiles:
    """Latency quantiles in ms over n samples; p99 is None where n cannot support it.

    >>> Quantiles(p50=1.0, p90=1.2, p99=None, n=100).p99 is None
    True
    """

    p50: float
    p90: float
    p99: float | None
    n: int


def quantiles(samples_ms: ArrayLike) -> Quantiles:
    """Latency quantiles of samples_ms (N,), in ms; p99 only with at least 459 samples.

    Raises ValueError for no samples, a wrong shape, or samples that are not finite.

    >>> quantiles([1.0, 2.0, 3.0, 4.0, 5.0])
    Quantiles(p50=3.0, p90=4.6, p99=None, n=5)
    """
    values = checked_scores(samples_ms, "samples_ms")
    p50, p90, p99 = (float(q) for q in np.quantile(values, [0.5, 0.9, 0.99]))
    return Quantiles(p50, p90, p99 if len(values) >= MIN_SAMPLES_P99 else None, len(values))


def median_ratio(
    original_rounds: Sequence[ArrayLike],
    candidate_rounds: Sequence[ArrayLike],
    confidence: float = 0.95,
    quantile: float = 0.5,
) -> Interval:
    """Speed-up median(original) / median(candidate) of interleaved rounds, with its interval; or
    that of another quantile.

    Round i of either list is a 1-D array of latencies, any unit, taken next to round i of the
    other. Whole rounds are resampled, by index, so that a drift of the machine meets both programs
    alike (the blocks of Künsch 1989, Annals of Statistics 17:1217); the spread of the log ratio
    over the resamples gives Student's interval with one degree of freedom less than rounds. Where
    rounds are few (under 10) or drift far more than samples scatter, it errs on the wide side.
    Raises ValueError for fewer than two rounds, unequal numbers of rounds, an empty round, or
    latencies that are not positive.

    >>> slow, fast = [[4.0, 4.2], [4.1, 4.0], [4.2, 4.1]], [[2.0, 2.1], [2.0, 2.0], [2.1, 2.0]]
    >>> interval = median_ratio(slow, fast)
    >>> f"{interval.estimate:.2f}, above 1: {interval.low > 1}"
    '2.05, above 1: True'
    >>> round(median_ratio(slow, fast, quantile=0.9).estimate, 2)
    2.0
    """
    before = _rounds(original_rounds, "original_rounds")
    after = _rounds(candidate_rounds, "candidate_rounds")
    rounds = len(before)
    if rounds < 2 or len(after) != rounds:
        raise ValueError(
            "original_rounds, candidate_rounds: expected equally many rounds, at least 2, "
            f"got {rounds} and {len(after)}; measure the two in turn, several times"
        )
    return _resampled(
        lambda weights: (
            _quantiles(before, weights, quantile) / _quantiles(after, weights, quantile)
        ),
        rounds,
        confidence,
    )


def median_interval(rounds: Sequence[ArrayLike], confidence: float = 0.95) -> Interval:
    """The median latency of rounds by itself, with its interval, as `median_ratio` finds it.

    Raises ValueError for fewer than two rounds, an empty one, or latencies that are not positive.

    >>> interval = median_interval([[4.0, 4.2], [4.1, 4.0], [4.2, 4.1]])
    >>> interval.low < interval.estimate < interval.high, round(interval.estimate, 2)
    (True, 4.1)
    """
    samples = _rounds(rounds, "rounds")
    if len(samples) < 2:
        raise ValueError(f"rounds: expected at least 2, got {len(samples)}")
    return _resampled(lambda weights: _quantiles(samples, weights), len(samples), confidence)


def _resampled(
    statistic: Callable[[NDArray[np.int64]], Floats], rounds: int, confidence: float = 0.95
) -> Interval:
    """Student's interval for the logarithm of a statistic, by resampling whole rounds.

    Args:
        statistic: how often each round is taken, (rows, rounds) -> (rows,).
    """
    from scipy.stats import t

    rng = np.random.default_rng(0)
    weights = rng.multinomial(rounds, np.full(rounds, 1 / rounds), RESAMPLES)  # (RESAMPLES, rounds)
    center = float(np.log(statistic(np.ones((1, rounds), dtype=np.int64)))[0])
    logs = np.log(statistic(weights))  # (RESAMPLES,)
    # rounds / (rounds - 1): resampling from few rounds understates the variance by that factor
    error = float(logs.std()) * math.sqrt(rounds / (rounds - 1))
    reach = error * float(t.isf(tail(confidence), rounds - 1))
    low, estimate, high = (math.exp(min(x, 700)) for x in (center - reach, center, center + reach))
    return Interval(low, high, estimate, confidence)


def speedup_sentence(interval: Interval) -> str:
    """Say a speed-up ratio in words; an interval that holds 1 is no measurable speed-up.

    >>> speedup_sentence(Interval(1.79, 1.90, 1.84))
    '1.84x faster (95 % interval 1.79 to 1.90)'
    >>> speedup_sentence(Interval(0.98, 1.03, 1.01))
    'no measurable speed-up (0.98x to 1.03x)'
    >>> speedup_sentence(Interval(0.8, 0.87, 0.83))
    '1.20x slower (95 % interval 1.15 to 1.25)'
    """
    found = interval.estimate, interval.low, interval.high
    said = " ".join(speed_change(*found))
    if interval.low <= 1 <= interval.high:
        return f"{said} ({interval.low:.2f}x to {interval.high:.2f}x)"
    _, low, high = away_from_one(*found)
    return f"{said} ({100 * interval.confidence:g} % interval {low} to {high})"


def _quantiles(rounds: list[Floats], weights: NDArray[np.int64], quantile: float = 0.5) -> Floats:
    """Quantile of the samples of all rounds, round r taken weights[:, r] times: (rows,)."""
    samples = np.concatenate(rounds)  # (N,)
    owner = np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])
    order = np.argsort(samples, kind="stable")
    samples, owner = samples[order], owner[order]
    found = []
    rows = max(1, CHUNK // len(samples))
    for start in range(0, len(weights), rows):
        taken = weights[start : start + rows].astype(np.int32)[:, owner]
        upto = np.cumsum(taken, axis=1, dtype=np.int32)  # (rows, N)
        rank = np.round(quantile * upto[:, -1:], 6)
        upper = (upto > np.floor(rank)).argmax(axis=1)
        lower = (upto >= np.ceil(rank)).argmax(axis=1)
        found.append((samples[lower] + samples[upper]) / 2)
    return np.concatenate(found)


def _rounds(rounds: Sequence[ArrayLike], name: str) -> list[Floats]:
    arrays = [checked_scores(samples, f"{name}[{i}]") for i, samples in enumerate(rounds)]
    for i, samples in enumerate(arrays):
        if samples.min() <= 0:
            raise ValueError(
                f"{name}[{i}]: expected positive latencies, got {samples.min()}; "
                "use a finer clock, or time several calls as one sample"
            )
    return arrays
