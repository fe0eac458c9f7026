"""What the compressed artifact must meet, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.core.measurement import Measurement
from paredown.core.units import GOALS, Limit, human, parse_drop, parse_limit

TIMED = ("latency", "throughput", "energy")  # what drifts with the machine's speed
DRIFT = 0.05  # of the original's, from which on it is said


@dataclass(frozen=True)
class Goals:
    """What the compressed artifact must meet; each goal is optional.

    ``max_drop`` is in points of a score between 0 and 1 (accuracy); for any other score it is a
    share of the baseline's mean score. ``throughput`` is a floor, the others are ceilings.

    Raises:
        UserError: a goal that cannot be read, with the forms that can.

    Example:
        >>> Goals(max_drop="1%", size="0.3x", latency="2ms").size
        Limit(value=0.3, relative=True)
    """

    max_drop: float | str | None = None
    size: Limit | str | None = None
    latency: Limit | str | None = None
    memory: Limit | str | None = None
    throughput: Limit | str | None = None
    energy: Limit | str | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None:
            object.__setattr__(self, "max_drop", parse_drop(self.max_drop))
        for goal in GOALS:
            if getattr(self, goal) is not None:
                object.__setattr__(self, goal, parse_limit(goal, getattr(self, goal)))

    def allowed_drop(self, baseline: Measurement) -> float | None:
        """The drop in the score's own unit, or None without such a goal."""
        if self.max_drop is None:
            return None
        drop = float(self.max_drop)
        return drop if baseline.score_in_points else drop * abs(baseline.score or 0.0)

    def missed(self, measurement: Measurement, beside: Measurement) -> list[str]:
        """One plain sentence for each goal that the measurement does not meet; empty means done."""
        sentences = [row.sentence for row in self.check(measurement, beside) if row.met is not True]
        return sentences

    def check(
        self, measurement: Measurement, beside: Measurement, baseline: Measurement | None = None
    ) -> list[GoalCheck]:
        """Each goal against what was measured; an unmeasured quantity never counts as met.

        Args:
            beside: the original, measured in turn with it: a machine's speed drifts, so a goal
                such as "0.8x" is judged by the two of one measurement.
            baseline: the original as it was measured first; an absolute goal is judged by the
                measurement alone, and tells how far the original has drifted since.
        """
        rows = []
        allowed = self.allowed_drop(beside)
        if allowed is not None:
            rows.append(_check_drop(allowed, measurement, beside))
        for goal in GOALS:
            limit = getattr(self, goal)
            if limit is not None:
                drifted = "" if limit.relative else _drifted(goal, beside, baseline or beside)
                rows.append(_check_limit(goal, limit, measurement, beside, drifted))
        return rows


@dataclass(frozen=True)
class GoalCheck:
    """One goal, the bound it means here, what was measured, and whether that meets it; and, of an
    absolute one, how far the original has drifted since its baseline, "" where it has not."""

    goal: str
    bound: float
    value: float | None
    met: bool
    sentence: str
    drifted: str = ""


def _check_drop(allowed: float, measurement: Measurement, baseline: Measurement) -> GoalCheck:
    if measurement.score is None or baseline.score is None:
        return GoalCheck("max_drop", allowed, None, False, "The score was not measured.")
    drop = baseline.score - measurement.score
    met = drop <= allowed + 1e-12
    scale, unit = (100, " points") if baseline.score_in_points else (1, "")
    moved = f"{'fell' if drop > 0 else 'rose'} by {abs(drop) * scale:.3g}{unit}"
    moved = moved if drop else "did not change"
    text = f"The score {moved}; the goal allows a fall of {allowed * scale:.3g}{unit}."
    return GoalCheck("max_drop", allowed, drop, met, text)


def drift(goal: str, beside: Measurement, baseline: Measurement) -> float:
    """The original's quantity in this measurement over that of its first; 1 where the machine's
    speed does not matter, or where it was not measured."""
    now, then = beside.quantity(goal), baseline.quantity(goal)
    return now / then if goal in TIMED and now and then else 1.0


def _drifted(goal: str, beside: Measurement, baseline: Measurement) -> str:
    change = drift(goal, beside, baseline)
    if abs(change - 1) < DRIFT:
        return ""
    now, then = (human(goal, each.quantity(goal) or 0.0) for each in (beside, baseline))
    return (
        f"The machine's speed has changed: the original's {goal} is {now} beside it, "
        f"{change:.2f}x of the {then} of its baseline."
    )


def _check_limit(
    goal: str, limit: Limit, measurement: Measurement, beside: Measurement, drifted: str
) -> GoalCheck:
    value, original = measurement.quantity(goal), beside.quantity(goal)
    if value is None or (limit.relative and original is None):
        text = f"{goal.capitalize()} could not be measured here, so its goal cannot be met."
        return GoalCheck(goal, limit.value, None, False, text)
    bound = limit.absolute(original or 0.0)
    met = value >= bound if goal == "throughput" else value <= bound
    relation = "at least" if goal == "throughput" else "at most"
    asked = f" ({limit.value:g}x of the original)" if limit.relative else ""
    text = (
        f"{goal.capitalize()} is {human(goal, value)}; "
        f"the goal is {relation} {human(goal, bound)}{asked}."
    )
    return GoalCheck(goal, bound, value, met, text, drifted)
