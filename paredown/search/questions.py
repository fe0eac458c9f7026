"""What a decision asks of the speed, so that a measurement can end where that is answered."""

from __future__ import annotations

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.measure.looks import Question
from paredown.search.decide import FASTER


def questions(goals: Goals, baseline: Measurement, best: str) -> list[Question]:
    """Whether the candidate is faster than the best so far, by enough to pay, and whether it meets
    the goals for its speed beside the original.

    Args:
        baseline: the original's measurement, by which an absolute goal becomes a ratio.
        best: the name under which the best so far is measured.

    Example:
        >>> found = questions(Goals(latency="0.5x"), Measurement(1), "original")
        >>> sorted(question.factor for question in found)
        [1.0, 1.02, 2.0]
    """
    factors = [(best, 1.0), (best, FASTER)]
    for goal in ("latency", "throughput"):
        limit = getattr(goals, goal)
        then = None if limit is None else 1.0 if limit.relative else baseline.quantity(goal)
        if then:
            ratio = limit.value / then
            factors.append(("original", ratio if goal == "throughput" else 1 / ratio))
    return [Question(before, "candidate", factor) for before, factor in factors]
