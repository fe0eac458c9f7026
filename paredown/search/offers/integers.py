"""8-bit integers: alone, with training, and all but a few layers."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.search.pieces import asked, int8, make, recovery
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation


def alone(situation: Situation) -> Sequence[Proposal]:
    """Where they should do for the goals by themselves."""
    return _alone(situation) if situation.share.left >= 1 else []


def alone_though_too_little(situation: Situation) -> Sequence[Proposal]:
    """Where more is asked for, and nothing can be trained."""
    return _alone(situation) if situation.share.left < 1 and not situation.trains else []


def _alone(situation: Situation) -> Sequence[Proposal]:
    attempt = int8(situation)
    if attempt is None:
        return []
    why = "8-bit integers need calibration data alone, and no training"
    return [Proposal("int8", f"{asked(situation.goals)}: {why}", (attempt,))]


def trained(situation: Situation) -> Sequence[Proposal]:
    """Wherever there is something to train with."""
    integers = int8(situation)
    if integers is None or not situation.trains:
        return []
    attempt = Attempt(
        (*integers.steps, recovery(situation, 1e-4)),
        "8-bit integers, then train through the rounding",
        "where 8-bit integers alone lose too much, training through the rounding wins it back",
        integers.expected,
    )
    reason = "the fallback where accuracy is the goal missed"
    return [Proposal("int8 with training", reason, (attempt,))]


def mixed(situation: Situation) -> Sequence[Proposal]:
    """Where a drop of the score is bounded, and can be measured."""
    integers, max_drop = int8(situation), situation.goals.max_drop
    if integers is None or max_drop is None or situation.task.missing({"validation", "score"}):
        return []
    attempt = Attempt(
        (make("quantize", max_drop=float(max_drop)),),
        "8-bit integers, but for a few layers",
        "layers that cost most of the score for the bytes that they save stay in float, as few as "
        "the score needs",
        integers.expected,
    )
    reason = "the fallback where a few layers cannot be rounded; without training"
    return [Proposal("int8 in mixed precision", reason, (attempt,))]
