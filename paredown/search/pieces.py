"""What several offers are made of."""

from __future__ import annotations

from dataclasses import replace

from paredown.core.goals import Goals
from paredown.core.units import GOALS, human
from paredown.data import splits
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation, expected_integer_bytes
from paredown.steps import step_class
from paredown.steps.step import Step

MARGIN = 0.85  # of what would do: what is expected and what comes differ
RECOVERY_EPOCHS = (3, 10)  # at least and at most, in between as many as
RECOVERY_STEPS = 100  # updates take


def make(name: str, **settings: object) -> Step:
    return step_class(name)(**settings)


def int8(situation: Situation) -> Attempt | None:
    """8-bit integers, where the model can get any that make it smaller."""
    integers, whole = situation.integers, situation.baseline.size_bytes
    if integers is None:
        return None
    size = expected_integer_bytes(situation.model, whole, integers)
    return Attempt(
        (make("quantize"),),
        "8-bit integers",
        "weights in a byte instead of four, and kernels that compute on bytes",
        f"about {human('size', size)} ({size / whole:.2f}x); 1 to 3 times as fast "
        "where layers are large enough",
    )


def then_int8(
    situation: Situation, title: str, reason: str, attempts: tuple[Attempt, ...]
) -> Proposal:
    """The attempts, and 8-bit integers behind them where there can be any."""
    integers = int8(situation)
    if integers is None:
        return Proposal(title, reason, attempts)
    reason += ", and quantize last, so that the integer ranges are those of the final weights"
    small = replace(integers, expected="a quarter of the bytes left; 1 to 3 times as fast")
    return Proposal(f"{title}, then int8", reason, (*attempts, small))


def recovery(situation: Situation, lr: float) -> Step:
    """Fine-tuning on the task's loss, or where it has none, what the original says."""
    how = {"epochs": _recovery_epochs(situation), "lr": lr, "seed": situation.seed}
    return make("fine_tune", **how) if situation.task.loss else make("distill", alpha=0.0, **how)


def _recovery_epochs(situation: Situation) -> int:
    """More passes over data that is soon through."""
    task = situation.task
    steps = -(-splits.size(splits.split(task, "train")) // task.batch_size)
    least, most = RECOVERY_EPOCHS
    return max(least, min(most, -(-RECOVERY_STEPS // steps)))


def asked(goals: Goals) -> str:
    """What the goals ask for.

    Example:
        >>> asked(Goals(size="0.3x", latency="2ms")), asked(Goals(max_drop="1%"))
        ('size and latency are asked for', 'no amount is asked for')
    """
    names = [goal for goal in GOALS if getattr(goals, goal) is not None]
    if not names:
        return "no amount is asked for"
    *others, last = names
    listed = f"{', '.join(others)} and {last}" if others else last
    return f"{listed} {'are' if others else 'is'} asked for"
