"""Intervals, paired comparisons and non-inferiority: what a report may claim, and how surely.

Every function is pure and deterministic; where numbers are drawn, the seed is fixed.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from paredown.core.units import amount

Floats = NDArray[np.float64]
Status = Literal["proven", "refuted", "not provable"]
# A resample misses all of k odd values with probability about exp(-k). Below this k the bootstrap
# would take "rarely seen" for "cannot happen".
MIN_ODD = 10
RESAMPLES = 2000
MAX_GROUPS = 1024  # bounds the time and memory of a resample
CHUNK = 2_000_000  # numbers held at once while resampling
POWER = 0.90


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence interval.

    >>> Interval(low=0.1, high=0.4, estimate=0.2)
    Interval(low=0.1, high=0.4, estimate=0.2, confidence=0.95)
    """

    low: float
    high: float
    estimate: float
    confidence: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate's drop stays within its budget, and the sentence that says so.

    difference is candidate minus original in the score's own units; needed is the number of
    examples that would prove it with power 0.9 if nothing were lost, None where no number would.

    >>> Verdict("proven", Interval(-0.01, 0.01, 0.0), 100, "...").status
    'proven'
    """

    status: Status
    difference: Interval
    needed: int | None
    sentence: str


def mean_interval(scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of per-example scores (N,) with its interval.

    All scores 0 or 1: Wilson's score interval (Wilson 1927, JASA 22:209). Otherwise Student's,
    widened at either end to the studentised bootstrap's (Hall 1988, Annals of Statistics 16:927)
    where at least 10 scores differ from the most common one; zero width where all are equal.
    Scores within [0, 1] keep their interval within [0, 1].
    Raises ValueError for no scores, a wrong shape, or scores that are not finite.

    >>> interval = mean_interval([1] * 9 + [0])
    >>> f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    '0.90 (0.60 to 0.98)'
    """
    from scipy.stats import norm

    values = checked_scores(scores, "scores")
    z = float(norm.isf(tail(confidence)))
    estimate = float(values.mean())
    if _binary(values):
        low, high = _wilson(estimate, len(values), z)
    else:
        low, high = _mean_bounds(values, confidence)
        if _within_unit(values):
            low, high = max(low, 0.0), min(high, 1.0)
    return Interval(low, high, estimate, confidence)


def paired_difference(
    original: ArrayLike, candidate: ArrayLike, confidence: float = 0.95
) -> Interval:
    """Mean(candidate) - mean(original) on the same examples, (N,) each, with its interval.

    All scores 0 or 1: Tango's score interval (Tango 1998, Statistics in Medicine 17:891).
    Otherwise that of `mean_interval` for the differences. Where fewer than 10 examples changed, no
    resampling can tell how rare a change is: the interval is then as wide as Tango's for that many
    changes, each as large as the scores' span (1 where all lie in [0, 1]).
    Raises ValueError for arrays that are empty, not finite, or of different lengths.

    >>> interval = paired_difference([1] * 90 + [0] * 10, [1] * 88 + [0] * 11 + [1])
    >>> f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
    '-0.010 (-0.061 to +0.037)'
    """
    from scipy.stats import norm

    before, after = _pair(original, candidate)
    z = float(norm.isf(tail(confidence)))
    change = after - before
    estimate = float(change.mean())
    wins, losses = _counts(before, after)
    if _binary(before, after):
        low, high = _tango(wins, losses, len(change), z)
    elif wins + losses >= MIN_ODD:
        low, high = _mean_bounds(change, confidence)
    else:
        center, span = (wins - losses) / len(change), _span(before, after)
        low, high = _tango(wins, losses, len(change), z)
        low, high = estimate - span * (center - low), estimate + span * (high - center)
    return Interval(low, high, estimate, confidence)


def mcnemar_p(original: ArrayLike, candidate: ArrayLike) -> float:
    """Exact two-sided McNemar p-value that two sets of 0/1 scores (N,) are equally good.

    McNemar 1947, Psychometrika 12:153, by the binomial distribution of the examples that changed.
    Raises ValueError for scores other than 0 and 1, and as `paired_difference` does.

    >>> mcnemar_p([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])
    0.0625
    """
    from scipy.stats import binom

    before, after = _pair(original, candidate)
    if not _binary(before, after):
        raise ValueError(
            "original, candidate: McNemar's test takes scores of 0 and 1, got others; "
            "use paired_difference, which takes any score"
        )
    wins, losses = _counts(before, after)
    return min(1.0, 2 * float(binom.cdf(min(wins, losses), wins + losses, 0.5)))


def non_inferior(
    original: ArrayLike,
    candidate: ArrayLike,
    max_drop: float,
    confidence: float = 0.95,
    *,
    name: str = "accuracy",
    unit: str | None = None,
) -> Verdict:
    """Decide whether the mean score fell by at most max_drop, on the same examples, (N,) each.

    "proven" where the one-sided lower bound of the difference lies above -max_drop, "refuted"
    where the one-sided upper bound lies below it, otherwise "not provable". max_drop is in the
    score's own units. The sentence speaks of `name`, in points (hundredths) where all scores lie
    in [0, 1] and no unit is given, otherwise in the score's own `unit`.
    Raises ValueError for a negative max_drop, a confidence outside (0.5, 1), and as
    `paired_difference` does.

    >>> right, wrong = [1] * 970, [0] * 30
    >>> non_inferior(right + wrong, [0] + right[1:] + wrong, max_drop=0.01).sentence
    'accuracy did not measurably change: -0.10 points (95 % interval -0.56 to +0.28 over 1,000 \
examples); a drop of at most 1 point is proven'
    """
    before, after = _pair(original, candidate)
    if not (max_drop >= 0 and 0.5 < confidence < 1):
        raise ValueError(
            "max_drop, confidence: expected a drop of at least 0 and a confidence between 0.5 and "
            f"1, got {max_drop} and {confidence}; give for example 0.01 and 0.95"
        )
    difference = paired_difference(before, after, confidence)
    one_sided = paired_difference(before, after, 2 * confidence - 1)
    status: Status = "not provable"
    if one_sided.low > -max_drop:
        status = "proven"
    elif one_sided.high < -max_drop:
        status = "refuted"
    verdict = Verdict(status, difference, _needed(before, after, max_drop, confidence), "")
    if unit is None and not _within_unit(before, after):
        unit = ""
    sentence = _sentence(verdict, one_sided, len(before), max_drop, name, unit)
    return replace(verdict, sentence=sentence)


# The mathematics


def _wilson(proportion: float, n: int, z: float) -> tuple[float, float]:
    center = (proportion + z * z / (2 * n)) / (1 + z * z / n)
    spread = math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    half = z / (1 + z * z / n) * spread
    return max(0.0, center - half), min(1.0, center + half)


def _tango(wins: int, losses: int, n: int, z: float) -> tuple[float, float]:
    """Both ends of Tango's interval for (wins - losses) / n; one is the other's mirror image."""
    return _tango_low(wins, losses, n, z), -_tango_low(losses, wins, n, z)


def _tango_low(wins: int, losses: int, n: int, z: float) -> float:
    """Find the difference below the observed one that the score test just does not reject."""
    from scipy.optimize import brentq

    if losses == n:
        return -1.0

    def excess(delta: float) -> float:
        # P(loss) of greatest likelihood when P(win) - P(loss) = delta: the root of a quadratic
        b = (2 * n - wins + losses) * delta - wins - losses
        c = -losses * delta * (1 - delta)
        loss = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * loss + delta * (1 - delta))
        return wins - losses - n * delta - z * math.sqrt(max(0.0, variance))

    # just below the estimate: where nothing varies, the estimate itself is a second root
    top = (wins - losses) / n - 1e-12
    return float(brentq(excess, -1.0, top, xtol=1e-12)) if excess(top) < 0 else top


def _mean_bounds(values: Floats, confidence: float) -> tuple[float, float]:
    """Bounds of the mean of values (N,) that are not a proportion."""
    from scipy.stats import t

    n, mean = len(values), float(values.mean())
    if (values == values[0]).all():
        return mean, mean
    error = float(values.std(ddof=1)) / math.sqrt(n)
    tails = [tail(confidence), 1 - tail(confidence)]
    below, above = (float(x) for x in t.ppf(tails, n - 1))
    if n - np.unique(values, return_counts=True)[1].max() >= MIN_ODD:
        # widen, never narrow: of rarely changing scores the skewness is known too badly for that
        drawn = np.quantile(_studentised(values), tails)
        below, above = min(below, float(drawn[0])), max(above, float(drawn[1]))
    return mean - above * error, mean - below * error


def _studentised(values: Floats) -> Floats:
    """Bootstrap distribution (RESAMPLES,) of (mean - true mean) / standard error.

    Beyond MAX_GROUPS values, means of random groups stand for them: the skewness of the overall
    mean, which is what this distribution adds to Student's, is the same.
    """
    rng = np.random.default_rng(0)
    size = math.ceil(len(values) / MAX_GROUPS)
    if size > 1:
        kept = rng.permutation(values)[: len(values) // size * size]
        values = kept.reshape(-1, size).mean(axis=1)
    n = len(values)
    values = (values - values.mean()) / values.std()
    parts = []
    rows = max(1, CHUNK // n)
    for start in range(0, RESAMPLES, rows):
        drawn = values[rng.integers(0, n, (min(rows, RESAMPLES - start), n))]
        spread = np.maximum(drawn.std(axis=1, ddof=1), 1e-9)
        parts.append(drawn.mean(axis=1) * math.sqrt(n) / spread)
    return np.concatenate(parts)


def _needed(before: Floats, after: Floats, max_drop: float, confidence: float) -> int | None:
    """Examples that prove the budget with power 0.9 when the true difference is 0.

    The squared change per example is, for 0/1 scores, the share of discordant pairs.
    """
    from scipy.stats import norm

    if max_drop == 0:
        return None
    z = float(norm.isf(1 - confidence))
    discordance = float(np.mean((after - before) ** 2))
    needed = (z + float(norm.isf(1 - POWER))) ** 2 * discordance / max_drop**2
    wins, losses = _counts(before, after)
    if _binary(before, after) or wins + losses < MIN_ODD:
        # even with no change at all, the interval reaches down to z^2 / (n + z^2) of the span
        needed = max(needed, z * z * (_span(before, after) / max_drop - 1))
    return max(MIN_ODD, math.ceil(needed))


# The words


MOST_PLACES = 9  # of a number that is not written with an exponent


def _sentence(
    verdict: Verdict, one_sided: Interval, n: int, max_drop: float, name: str, unit: str | None
) -> str:
    """Say a verdict; unit None means points, that is hundredths."""
    scale, unit = (100.0, "points") if unit is None else (1.0, unit)
    difference = verdict.difference
    width = scale * (difference.high - difference.low)
    told = width or scale * abs(difference.estimate)  # all differences may be the same
    places = max(0, 1 - math.floor(math.log10(told))) if told else 3
    fine = _fine(scale * abs(difference.estimate), places)

    def number(value: float, sign: str = "+", places: int = places) -> str:
        if places > MOST_PLACES:
            return f"{scale * value:{sign}.2g}"
        return f"{round(scale * value, places) + 0.0:{sign},.{places}f}"

    interval = f"{number(difference.low)} to {number(difference.high)}"
    examples = f"{n:,} example{'s' if n > 1 else ''}"
    budget = amount(scale * max_drop, unit)
    if verdict.status == "not provable":
        leaves = f"leave{'s' if n == 1 else ''} the interval at {interval} {unit}".strip()
        advice = _advice(verdict, n, max_drop, budget)
        return f"not provable with this data: {examples} {leaves}; {advice}"
    refuted = verdict.status == "refuted"
    claim = f"a drop of {'more than' if refuted else 'at most'} {budget} is proven"
    # the two-sided interval alone would seem to contradict the one-sided test
    if difference.low <= -max_drop <= difference.high:
        claim += f" (one-sided bound {number(one_sided.high if refuted else one_sided.low)})"
    size = f"{number(abs(difference.estimate), '', fine)} {unit}".strip()
    level = f"{100 * difference.confidence:g} %"
    return (
        f"{name} {moved(difference, size)} ({level} interval {interval} over {examples}); {claim}"
    )


def moved(difference: Interval, size: str) -> str:
    """How a score moved, in words: an interval that holds 0 is no measurable change.

    Args:
        size: how far, without a sign.

    >>> moved(Interval(0.1, 0.3, 0.2), "0.2"), moved(Interval(-0.3, 0.1, -0.1), "0.1 points")
    ('rose by 0.2', 'did not measurably change: -0.1 points')
    """
    fell = difference.estimate < 0
    if difference.estimate == 0:
        return "did not change"
    if difference.low <= 0 <= difference.high:
        return f"did not measurably change: {'-' if fell else '+'}{size}"
    return f"{'fell' if fell else 'rose'} by {size}"


def _fine(value: float, places: int) -> int:
    """Places that tell an estimate to three digits, as it is told everywhere else; at least those
    of its interval."""
    more = range(places, places + 3)
    return next((p for p in more if round(value, p) == float(f"{value:.3g}")), places)


def _advice(verdict: Verdict, n: int, max_drop: float, budget: str) -> str:
    """What would prove the budget."""
    needed = verdict.needed
    if needed is None:
        return "only a better candidate could prove that nothing was lost"
    if needed <= n:
        return f"the change lies too near a drop of {budget} to tell"
    if verdict.difference.estimate < -max_drop:
        return (
            f"as measured the drop is more than {budget}; only if nothing was lost in truth would "
            f"about {needed:,} prove that it is not"
        )
    return f"about {needed:,} would be needed to prove a drop of at most {budget}"


# The checks


def checked_scores(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if array.ndim != 1 or array.size == 0 or bad:
        got = f"{bad} NaN or infinite of {array.size}" if bad else f"shape {array.shape}"
        raise ValueError(
            f"{name}: expected a 1-D array of finite numbers, at least one, got {got}; "
            "give one number per example or call"
        )
    return array


def _pair(original: ArrayLike, candidate: ArrayLike) -> tuple[Floats, Floats]:
    before, after = checked_scores(original, "original"), checked_scores(candidate, "candidate")
    if len(before) != len(after):
        raise ValueError(
            f"candidate: expected {len(before)} scores as in original, got {len(after)}; "
            "score both on the same examples, in the same order"
        )
    return before, after


def tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(
            f"confidence: expected more than 0 and less than 1, got {confidence}; "
            "give a fraction such as 0.95"
        )
    return (1 - confidence) / 2


def _binary(*arrays: Floats) -> bool:
    return all(bool(((a == 0) | (a == 1)).all()) for a in arrays)


def _within_unit(*arrays: Floats) -> bool:
    return all(bool(((a >= 0) & (a <= 1)).all()) for a in arrays)


def _span(before: Floats, after: Floats) -> float:
    """How far one example's score could plausibly move."""
    if _within_unit(before, after):
        return 1.0
    return float(max(before.max(), after.max()) - min(before.min(), after.min()))


def _counts(before: Floats, after: Floats) -> tuple[int, int]:
    """Examples that got better and worse by more than rounding noise."""
    noise = 1e-6 * _span(before, after)
    change = after - before
    return int(np.count_nonzero(change > noise)), int(np.count_nonzero(change < -noise))
