"""Whether what was measured pays, and which is best."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.core.goals import GoalCheck, Goals, drift
from paredown.core.measurement import Comparison, Measurement
from paredown.core.units import GOALS, Limit, amount, human
from paredown.measure.measure import Measured, compare

# an attempt pays below this share of the best so far
PAYS = {"size": 0.99, "memory": 0.97, "energy": 0.97}
PEAK_VARIES = 0.005  # a process's, from one to the next; beyond it the model's share of it counts
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
    checks = goals.check(standing.measurement, standing.beside, compared=standing.compared)
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
    return max(0.0, 1 / ratio - 1 if goal == "throughput" else ratio - 1)


def _even(compared: Comparison | None) -> bool:
    """Whether no difference in speed was measurable."""
    low, high = (compared.speedup_low, compared.speedup_high) if compared else (None, None)
    return low is not None and high is not None and low <= 1 <= high


@dataclass(frozen=True)
class Decision:
    """Whether a step is kept, why, and whether its file may be the run's all the same."""

    kept: bool
    words: str
    stands: bool


def decide(goals: Goals, measured: dict[str, Measured]) -> Decision:
    """Keep what brings a stated goal nearer on the exported file, and takes none that is missed
    further away; never what costs more of the score than the goal allows.

    A gain that was not asked for is kept too, where it costs nothing that was. Without an amount
    that is asked for, what is smaller, faster or lighter pays, or scores better.

    ``measured`` holds the original, the candidate and the best so far, where that is not the
    original, measured together.
    """
    standing, beside = measured.get("best", measured["original"]), measured["original"].measurement
    best, candidate = standing.measurement, measured["candidate"].measurement
    fell = too_far(goals, beside, candidate)
    if fell:
        return Decision(False, fell, False)
    against_best = compare(standing, measured["candidate"], None)
    size = candidate.size_bytes / best.size_bytes
    share = f"{size:.2f}" if size >= 0.01 else f"{size:.2g}"
    found = f"size {_change('size', best, candidate)} ({share}x), {against_best.speed}"
    if _gain("memory", best, candidate, against_best) > 0:
        found = f"peak memory {_change('memory', best, candidate)}; {found}"
    if _better(against_best):
        found = f"{against_best.verdict.partition(';')[0]}; {found}"
    nearer, further = _moved(goals, best, candidate, beside, against_best)
    if further:
        goal = " and ".join(further)
        return Decision(False, f"it takes a missed goal, {goal}, further away: {found}", True)
    pays = _better(against_best) or any(
        _gain(goal, best, candidate, against_best) > 0 for goal in ("size", "latency", "memory")
    )
    if not nearer and not pays:
        return Decision(False, f"it does not pay in the exported file: {found}", False)
    if not nearer and asks(goals) and (against_best.score_difference_high or 0.0) < 0:
        return Decision(False, f"it costs score and brings no goal nearer: {found}", False)
    return Decision(True, found, True)


def asks(goals: Goals) -> bool:
    """Whether an amount is asked for, and not only that the score holds.

    Example:
        >>> asks(Goals(max_drop="1%")), asks(Goals(max_drop="1%", size="0.3x"))
        (False, True)
    """
    return any(getattr(goals, goal) is not None for goal in GOALS)


def too_far(goals: Goals, beside: Measurement, candidate: Measurement) -> str:
    """That the score fell by more than the goal allows, in words; "" where it did not."""
    allowed = goals.allowed_drop(beside)
    drop = (beside.score or 0.0) - (candidate.score or 0.0)
    if allowed is None or drop <= allowed + 1e-12:
        return ""
    scale, unit = (100, "points") if candidate.score_in_points else (1, "")
    fell, most = amount(drop * scale, unit), amount(allowed * scale, "")
    return f"the score fell by {fell}; the goal allows {most}"


def _moved(
    goals: Goals,
    best: Measurement,
    candidate: Measurement,
    beside: Measurement,
    against_best: Comparison,
) -> tuple[list[str], list[str]]:
    """The missed goals that the candidate brings nearer, and those it takes further away."""
    before, after = (
        {check.goal: check.within for check in goals.check(each, beside)}
        for each in (best, candidate)
    )
    nearer, further = [], []
    for goal in (goal for goal in GOALS if goal in after):
        gain = _gain(goal, best, candidate, against_best, process=_is_absolute(goals.memory))
        if not before[goal] and (after[goal] or gain > 0):
            nearer.append(goal)
        if not after[goal] and gain < 0:
            further.append(goal)
    return nearer, further


def _is_absolute(limit: Limit | str | None) -> bool:
    """Whether a goal for memory speaks of the process, in place of the model's own share."""
    return isinstance(limit, Limit) and not limit.relative


def _gain(
    goal: str,
    best: Measurement,
    candidate: Measurement,
    against_best: Comparison,
    process: bool = False,
) -> int:
    """1 where the candidate is measurably better than the best so far, -1 where it is worse, 0
    where the two are the same as far as was measured; of memory the model's own share counts, or
    that of its whole process."""
    if goal in ("latency", "throughput"):
        if _faster(against_best):
            return 1
        slower = (against_best.speedup or 1) <= 1 / FASTER and (against_best.speedup_high or 2) < 1
        return -1 if slower else 0
    before, after = best.quantity(goal), candidate.quantity(goal)
    if not before or not after:
        return 0
    if goal == "memory" and not process and abs(after - before) > PEAK_VARIES * before:
        own = best.quantity("memory_model"), candidate.quantity("memory_model")
        before, after = own[0] or before, own[1] or after
    share = after / before
    return 1 if share <= PAYS[goal] else -1 if share >= 1 / PAYS[goal] else 0


def _better(against_best: Comparison) -> bool:
    """Whether the score rose beyond its interval."""
    return (against_best.score_difference_low or 0) > 0


def _faster(against_best: Comparison) -> bool:
    return (against_best.speedup or 1) >= FASTER and (against_best.speedup_low or 0) > 1


def _change(goal: str, before: Measurement, after: Measurement) -> str:
    return " to ".join(human(goal, m.quantity(goal) or 0.0) for m in (before, after))
