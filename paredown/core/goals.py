"""What the compressed artifact must meet, and whether it does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from paredown.core.measurement import Comparison, Measurement
from paredown.core.settings import check_arguments
from paredown.core.units import GOALS, Limit, amount, human, parse_drop, parse_limit

TIMED = ("latency", "throughput", "energy")  # what drifts with the machine's speed
DRIFT = 0.05  # of the original's, from which on it is said


@dataclass(frozen=True)
class Goals:
    """What the compressed artifact must meet; each goal is optional.

    ``max_drop`` is in points of a score between 0 and 1 (accuracy); for any other score it is a
    share of the baseline's mean score. ``throughput`` is a floor, the others are ceilings.
    ``memory`` as a quantity, "64 MiB", bounds the peak of the whole process; relative, "0.5x", it
    speaks of what the model adds to the runtime, which no step can make smaller. With ``proof`` a
    goal that the data cannot prove to be met counts as missed.

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
    proof: bool = False

    def __post_init__(self) -> None:
        check_arguments(proof=(self.proof, bool))
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

    def missed(
        self, measurement: Measurement, beside: Measurement, compared: Comparison | None = None
    ) -> list[str]:
        """One plain sentence for each goal that the measurement does not meet; empty means done."""
        checks = self.check(measurement, beside, compared=compared)
        return [row.sentence for row in checks if not row.met]

    def check(
        self,
        measurement: Measurement,
        beside: Measurement,
        baseline: Measurement | None = None,
        compared: Comparison | None = None,
    ) -> list[GoalCheck]:
        """Each goal against what was measured; an unmeasured quantity never counts as met.

        Args:
            beside: the original, measured in turn with it: a machine's speed drifts, so a goal
                such as "0.8x" is judged by the two of one measurement.
            baseline: the original as it was measured first; an absolute goal is judged by the
                measurement alone, and tells how far the original has drifted since.
            compared: the two, with intervals: says which goals are proven to be met.
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
        if compared is None:
            return rows
        return [
            _proved(row, _proof(row, getattr(self, row.goal), compared, measurement), self.proof)
            for row in rows
        ]


@dataclass(frozen=True)
class GoalCheck:
    """One goal, the bound it means here, what was measured, and whether that meets it.

    Attributes:
        met: whether the value is within the bound; where a proof is asked for, proven to be.
        drifted: of an absolute goal, how far the original has drifted since its baseline, "" where
            it has not.
        proven: whether the interval of what was measured lies within the bound too; None where
            there is no interval, as of a size.
        quantity: the figure of a `Measurement` that the goal speaks of, where it is not its own.
    """

    goal: str
    bound: float
    value: float | None
    met: bool
    sentence: str
    drifted: str = ""
    proven: bool | None = None
    quantity: str = ""

    @property
    def title(self) -> str:
        """What the goal speaks of, in a word."""
        return "score" if self.goal == "max_drop" else self.goal

    @property
    def within(self) -> bool:
        """Whether what was measured meets the goal, proven or not."""
        return self.met or self.unproven

    @property
    def unproven(self) -> bool:
        """Whether what was measured meets the goal, and its interval leaves that open."""
        within = self.value is not None and _holds(self.goal, self.value, self.bound)
        return within and self.proven is False


def _holds(goal: str, value: float, bound: float) -> bool:
    if goal == "max_drop":
        return value <= bound + 1e-12
    return value >= bound if goal == "throughput" else value <= bound


def _proof(
    row: GoalCheck, limit: Any, compared: Comparison, measurement: Measurement
) -> tuple[bool | None, str]:
    """Whether the interval of what was measured lies within the bound, and where it ends if not;
    None where there is no interval."""
    if row.goal == "max_drop" and compared.score_claim:
        return compared.score_claim == "proven", ""
    if row.goal not in ("latency", "throughput"):
        return None, ""
    if limit.relative:
        wanted = limit.value if row.goal == "throughput" else 1 / limit.value
        return (compared.speedup_low >= wanted if compared.speedup_low else None), ""
    slowest, median = compared.latency_ms_high, measurement.latency_ms_p50
    if not slowest or not median or row.value is None:
        return None, ""
    # batches a second go by the same times
    end = row.value * median / slowest if row.goal == "throughput" else slowest
    return _holds(row.goal, end, row.bound), f": its 95 % interval ends at {human(row.goal, end)}"


def _proved(row: GoalCheck, found: tuple[bool | None, str], strict: bool) -> GoalCheck:
    """The goal with whether it is proven, which a strict one must be to be met."""
    row = replace(row, proven=found[0])
    if not row.unproven:
        return row
    text = f"{row.sentence} This is not proven with this data{found[1]}."
    return replace(row, met=row.met and not strict, sentence=text)


def _check_drop(allowed: float, measurement: Measurement, baseline: Measurement) -> GoalCheck:
    if measurement.score is None or baseline.score is None:
        return GoalCheck("max_drop", allowed, None, False, "The score was not measured.")
    drop = baseline.score - measurement.score
    met = _holds("max_drop", drop, allowed)
    scale, unit = (100, "points") if baseline.score_in_points else (1, "")
    moved = f"{'fell' if drop > 0 else 'rose'} by {amount(abs(drop) * scale, unit)}"
    moved = moved if drop else "did not change"
    text = f"The score {moved}; the goal allows a fall of {amount(allowed * scale, unit)}."
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
    name = "memory_model" if goal == "memory" and limit.relative else goal
    value, original = measurement.quantity(name), beside.quantity(name)
    if value is None or (limit.relative and original is None):
        text = f"{goal.capitalize()} could not be measured here, so its goal cannot be met."
        return GoalCheck(goal, limit.value, None, False, text)
    bound = limit.absolute(original or 0.0)
    met = _holds(goal, value, bound)
    relation = "at least" if goal == "throughput" else "at most"
    asked = f" ({limit.value:g}x of the original)" if limit.relative else ""
    whole = _of_the_process(measurement) if name != goal else ""
    text = (
        f"{'Memory of the model' if whole else goal.capitalize()} is {human(goal, value)}{whole}; "
        f"the goal is {relation} {human(goal, bound)}{asked}."
    )
    return GoalCheck(goal, bound, value, met, text, drifted, quantity=name if name != goal else "")


def _of_the_process(measurement: Measurement) -> str:
    return f" of the {human('memory', measurement.memory_bytes or 0)} of its process"
