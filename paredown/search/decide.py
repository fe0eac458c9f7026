"""Whether what was measured pays, and which is best."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.core.goals import GoalCheck, Goals, drift
from paredown.core.measurement import Comparison, Measurement
from paredown.core.units import human
from paredown.measure.measure import Measured, compare

PAYS = {"size": 0.99, "memory": 0.97}  # an attempt pays below this share of the best so far
FASTER = 1.02  # and above this speed-up, if its interval excludes 1


@dataclass(frozen=True)
class Standing:
    """A file's measurement, the original's beside it, and the two compared; both of one call of
    `measure`, so that the machine's speed is the same for both.

    ``compared`` is None of the original itself.
    """

    measurement: Measurement
    beside: Measurement
    compared: Comparison | None = None


def rank(goals: Goals, standing: Standing, baseline: Measurement) -> tuple[float, ...]:
    """Fewest goals missed, then the least excess over the bounds, then the smallest file.

    Files are measured minutes apart, so their excess in time is that of the ratio to the original
    beside them, at the speed of its ``baseline``; what is not measurably faster or slower than the
    original counts as equal to it, so that noise does not outrank a smaller file.
    """
    checks = goals.check(standing.measurement, standing.beside)
    missed = [check for check in checks if not check.met]
    excess = sum(_excess(goals, check, standing, baseline) for check in missed)
    return (-len(missed), -round(excess, 6), -standing.measurement.size_bytes)


def _excess(goals: Goals, check: GoalCheck, standing: Standing, baseline: Measurement) -> float:
    value, goal = check.value, check.goal
    if value is None:
        return 1.0
    if goal in ("latency", "throughput") and _even(standing.compared):
        value = standing.beside.quantity(goal) or value
    if goal != "max_drop" and not getattr(goals, goal).relative:
        value /= drift(goal, standing.beside, baseline)
    ratio = value / max(check.bound, 1e-12)
    return 1 / ratio - 1 if goal == "throughput" else ratio - 1


def _even(compared: Comparison | None) -> bool:
    """Whether no difference in speed was measurable."""
    low, high = (compared.speedup_low, compared.speedup_high) if compared else (None, None)
    return low is not None and high is not None and low <= 1 <= high


def decide(measured: dict[str, Measured], allowed: float | None) -> tuple[bool, str]:
    """Keep what pays on the exported file and stays within the allowed drop of the score.

    ``measured`` holds the original, the candidate and the best so far, where that is not the
    original, measured together.
    """
    standing = measured.get("best", measured["original"])
    best, candidate = standing.measurement, measured["candidate"].measurement
    drop = (measured["original"].measurement.score or 0.0) - (candidate.score or 0.0)
    if allowed is not None and drop > allowed + 1e-12:
        scale, unit = (100, " points") if candidate.score_in_points else (1, "")
        return False, (
            f"the score fell by {drop * scale:.3g}{unit}; the goal allows {allowed * scale:.3g}"
        )
    against_best = compare(standing, measured["candidate"], None)
    size = candidate.size_bytes / best.size_bytes
    found = f"size {_change('size', best, candidate)} ({size:.2f}x), {against_best.speed}"
    if size <= PAYS["size"] or _faster(against_best):
        return True, found
    if _lighter(best, candidate):
        return True, f"peak memory {_change('memory', best, candidate)}; {found}"
    return False, f"it does not pay in the exported file: {found}"


def _faster(against_best: Comparison) -> bool:
    return (against_best.speedup or 1) >= FASTER and (against_best.speedup_low or 0) > 1


def _lighter(best: Measurement, candidate: Measurement) -> bool:
    if best.memory_bytes is None or candidate.memory_bytes is None:
        return False
    return candidate.memory_bytes / best.memory_bytes <= PAYS["memory"]


def _change(goal: str, before: Measurement, after: Measurement) -> str:
    return " to ".join(human(goal, m.quantity(goal) or 0.0) for m in (before, after))
