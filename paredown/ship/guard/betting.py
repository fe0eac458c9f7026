"""Tests that may be looked at all the time: wealth won by betting against a hypothesis.

Who bets on fair terms has, whatever the bets and whenever one looks, a chance of at most alpha of
ever holding 1 / alpha times the first stake (Ville 1939). So wealth is evidence: each class here
starts with 1, bets that its hypothesis is wrong, and refuses it at 1 / alpha (Waudby-Smith and
Ramdas, arXiv 2010.09686). Wealth is kept as logarithms. Pure NumPy; the leading dimensions of
``shape`` are independent runs, for simulations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# How many times the odds that a hypothesis allows an alternative has; one bet each, and its share
# of the stakes: most on the doubling that is to be found soonest.
FACTORS = (1.25, 1.6, 2.0, 3.0, 5.0, 10.0, 50.0, 1000.0)
SHARES = (0.04, 0.20, 0.40, 0.16, 0.08, 0.05, 0.04, 0.03)
# Of the greatest stake that cannot be lost in one draw, what a bet on a mean takes.
STAKES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
HELD = 0.2  # of the stakes, what is not placed at the start
LATE = 1000  # samples after which what is held begins to be placed


class Wealth:
    """Stakes on several bets: four fifths placed at once, the rest little by little, for ever.

    A bet that was placed at the start has lost nearly everything after a million good answers, and
    would see a fault that begins then much too late. What is placed later has lost nothing yet. Of
    the fifth that is held, ``1 / (1 + log(1 + k / 1000))`` is still there after ``k`` samples,
    whatever they were, so the whole is a fair game.

    Args:
        shares: of the stakes, one for each bet; they add up to 1.

    Example:
        >>> wealth = Wealth((1.0,))
        >>> wealth.add(np.array([math.log(4.0)]), samples=1)
        >>> round(math.exp(wealth.log_value()), 1)
        3.4
    """

    def __init__(self, shares: Sequence[float], shape: tuple[int, ...] = ()):
        self.samples = 0
        self._shares = np.log(np.array(shares))  # (bets,)
        self._log = np.full((*shape, len(shares)), -np.inf)

    def add(self, gains: Floats, samples: int) -> None:
        """Play one batch, for the stakes that are placed now and before.

        Args:
            gains: (..., bets), logarithm of what each bet makes of 1 in this batch.
            samples: how many it had; not to depend on what they were.
        """
        placed = _held_back(self.samples) - _held_back(self.samples + samples)
        stake = math.log(placed) if placed > 0 else -math.inf
        self._log = np.logaddexp(self._log, stake + self._shares) + gains
        self.samples += samples

    def log_value(self) -> Any:
        """Logarithm of the wealth: (...), or a number where there is one run."""
        held = math.log(_held_back(self.samples))
        value = np.logaddexp(np.logaddexp.reduce(self._log, axis=-1), held)
        return float(value) if value.ndim == 0 else value

    def to_json(self) -> dict[str, Any]:
        """Of one run, as plain JSON."""
        log = [None if each == -np.inf else float(each) for each in self._log]
        return {"samples": self.samples, "log": log}

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        log = np.array([-np.inf if each is None else float(each) for each in told["log"]])
        if log.shape != self._log.shape or np.isnan(log).any() or (log == np.inf).any():
            raise ValueError(f"log: expected {self._log.shape} numbers, got {told['log']!r}")
        self.samples, self._log = int(told["samples"]), log


def _held_back(samples: int) -> float:
    return HELD / (1 + math.log1p(samples / LATE)) if samples else 1.0


class RateTest:
    """Of a stream of yes and no. Hypothesis: yes comes at a rate of at most ``limit``, always.

    Each bet is a likelihood ratio of one higher rate to the limit, so only counts matter.

    Example:
        >>> test = RateTest(0.02)
        >>> for _ in range(10):
        ...     test.add(6, 100)  # 6 %
        >>> test.log_evidence() > math.log(1 / 0.01)
        True
    """

    def __init__(self, limit: float, shape: tuple[int, ...] = ()):
        odds = np.array(FACTORS) * limit / (1 - limit)
        rates = odds / (1 + odds)  # (bets,)
        self._yes, self._no = np.log(rates / limit), np.log((1 - rates) / (1 - limit))
        self.wealth = Wealth(SHARES, shape)

    def add(self, yes: ArrayLike, samples: int) -> None:
        """Count one batch: ``yes`` (...) of ``samples``."""
        count = np.asarray(yes, np.float64)[..., None]
        self.wealth.add(count * self._yes + (samples - count) * self._no, samples)

    def log_evidence(self) -> Any:
        """Logarithm of the wealth; the hypothesis is refused at log(1 / alpha)."""
        return self.wealth.log_value()


class RatioTest:
    """Of two streams. Hypothesis: in each batch the first one's rate is at most ``ratio`` times
    the second one's in the same batch, plus ``floor``.

    Only rates of the same batch meet, so both may change as they like, together. A bet multiplies
    by ``a`` at each yes of the first and by ``b`` at each of the second, and pays
    ``exp(n1 * floor * (a - 1))``. With rates r1 and r2 its expected gain is at most
    ``exp(n1 * r1 * (a - 1) + n2 * r2 * (b - 1) - n1 * floor * (a - 1))``, as 1 + x <= exp(x), and
    ``a`` and ``b`` are those of a coin with ``ratio * n1 : n2``, for which
    ``ratio * n1 * (a - 1) = n2 * (1 - b)``: it is at most 1, exactly, whatever r2 is. A yes of both
    to the same request gives less, as (a - 1) * (b - 1) < 0: pairs need not be independent.

    Example:
        >>> test = RatioTest(2.0, 0.001)
        >>> for _ in range(5):
        ...     test.add(4, 50, 1, 50)  # 8 % against 2 %
        >>> test.log_evidence() < math.log(1 / 0.001)
        True
        >>> for _ in range(40):
        ...     test.add(4, 50, 1, 50)
        >>> test.log_evidence() > math.log(1 / 0.001)
        True
    """

    def __init__(self, ratio: float, floor: float = 0.0, shape: tuple[int, ...] = ()):
        self.ratio, self.floor = ratio, floor
        self.wealth = Wealth(SHARES, shape)

    def add(self, yes: ArrayLike, samples: int, other_yes: ArrayLike, others: int) -> None:
        """Count one batch of both streams: yes (...) of so many samples each."""
        if not samples:
            return  # the second stream alone says nothing
        factors = np.array(FACTORS)
        fair = self.ratio * samples + others
        b = fair / (factors * self.ratio * samples + others)  # (bets,)
        a = factors * b
        first = np.asarray(yes, np.float64)[..., None]
        second = np.asarray(other_yes, np.float64)[..., None]
        price = samples * self.floor * (a - 1)
        self.wealth.add(first * np.log(a) + second * np.log(b) - price, samples)

    def log_evidence(self) -> Any:
        """Logarithm of the wealth; the hypothesis is refused at log(1 / alpha)."""
        return self.wealth.log_value()


class MeanTest:
    """Of numbers from ``low`` to ``high``. Hypothesis: their mean is at most ``limit``.

    A bet multiplies by ``1 + stake * (x - limit)``.

    Example:
        >>> test = MeanTest(0.0, low=-1.0)
        >>> test.add([0.5] * 40)
        >>> test.log_evidence() > math.log(1 / 0.01)
        True
    """

    def __init__(self, limit: float, low: float, shape: tuple[int, ...] = ()):
        self.limit = limit
        self._stakes = np.array(STAKES) / (limit - low)
        self.wealth = Wealth([1 / len(STAKES)] * len(STAKES), shape)

    def add(self, values: ArrayLike) -> None:
        """Count one batch (..., samples); all of it within the range."""
        array = np.asarray(values, np.float64)
        if array.shape[-1]:
            won = np.log1p(self._stakes * (array[..., None] - self.limit))
            self.wealth.add(won.sum(-2), array.shape[-1])

    def log_evidence(self) -> Any:
        """Logarithm of the wealth; the hypothesis is refused at log(1 / alpha)."""
        return self.wealth.log_value()


# --- bounds that hold at all times together ------------------------------------------------------


def rate_bounds(yes: int, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of a rate, each of which holds at all times together with
    ``confidence``.

    The rates at which a bet by Jeffreys' Beta(1/2, 1/2) has not won 1 / alpha (Robbins 1970, Annals
    of Mathematical Statistics 41:1397).

    Raises:
        ValueError: more yes than samples.

    Example:
        >>> low, high = rate_bounds(20, 1000)
        >>> f"{low:.3f} to {high:.3f}"
        '0.008 to 0.041'
        >>> rate_bounds(0, 0)
        (0.0, 1.0)
    """
    if not 0 <= yes <= samples:
        raise ValueError(f"yes: expected 0 to {samples}, got {yes}")
    if samples == 0:
        return 0.0, 1.0
    target = math.log(1 / (1 - confidence))
    won = _log_beta(yes + 0.5, samples - yes + 0.5) - _log_beta(0.5, 0.5)
    mid = yes / samples

    def inside(rate: float) -> bool:
        told = yes * math.log(rate) if yes else 0.0
        told += (samples - yes) * math.log1p(-rate) if samples > yes else 0.0
        return won - told < target

    return (
        _edge(mid, 0.0, inside) if yes else 0.0,
        _edge(mid, 1.0, inside) if yes < samples else 1.0,
    )


def _edge(good: float, bad: float, inside: Any) -> float:
    """Between one rate that is inside and one that is not, where that changes."""
    for _ in range(60):
        middle = (good + bad) / 2
        if inside(middle):
            good = middle
        else:
            bad = middle
    return bad


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


class MeanBounds:
    """Bounds of the mean of numbers from 0 to 1 that hold at all times together: the predictable
    plug-in empirical Bernstein bounds (Waudby-Smith and Ramdas, arXiv 2010.09686, theorem 2).

    Example:
        >>> bounds = MeanBounds(confidence=0.95)
        >>> bounds.add([0.5] * 1000)
        >>> low, high = bounds.bounds()
        >>> 0.48 < low < 0.5 < high < 0.52
        True
    """

    def __init__(self, confidence: float = 0.95):
        self._log = math.log(1 / (1 - confidence))  # of each bound by itself
        self.samples = 0
        self.total = 0.0
        self._squares = 0.25
        self._stakes = self._staked = self._paid = 0.0

    def add(self, values: Sequence[float]) -> None:
        """Count some more."""
        for value in values:
            self.samples += 1
            t, before = self.samples, (0.5 + self.total) / self.samples
            variance = self._squares / t
            stake = min(0.5, math.sqrt(2 * self._log / (variance * t * math.log1p(t))))
            self._stakes += stake
            self._staked += stake * value
            self._paid += (value - before) ** 2 * (-math.log1p(-stake) - stake)
            self.total += value
            self._squares += (value - (0.5 + self.total) / (t + 1)) ** 2

    def bounds(self) -> tuple[float, float]:
        """Lower and upper, each of which holds with the confidence."""
        if not self.samples:
            return 0.0, 1.0
        middle, half = self._staked / self._stakes, (self._log + self._paid) / self._stakes
        return max(0.0, middle - half), min(1.0, middle + half)
