"""Fewer than eight bits a weight, trained: four where they should do, else one."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.core.units import Limit, human
from paredown.search.pieces import MARGIN, asked, make, recovery
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation, expected_integer_bytes


def four_bits(situation: Situation) -> Sequence[Proposal]:
    """Where eight are too many for the size, and four are expected to do for it."""
    if not _four_do(situation, 1.0):
        return []
    attempt = Attempt(
        (make("quantize", scheme="int4"), recovery(situation, 1e-3)),
        "4-bit weights on 8-bit kernels, then train through the rounding",
        "two weights to a byte; the channels stay, and training wins back the rounding",
        f"about {_told(situation, 4)}",
    )
    return [Proposal("int4 with training", asked(situation.goals), (attempt,))]


def signs(situation: Situation) -> Sequence[Proposal]:
    """Where not even four bits should do for the size, with a margin."""
    wanted = _asked_bytes(situation) is not None and not _four_do(situation, MARGIN)
    if not wanted or "binary" not in situation.runtime.FORMS:
        return []
    attempt = Attempt(
        (make("binarize"), recovery(situation, 1e-3), make("quantize")),
        "Signs for weights, trained, then 8-bit activations",
        "one bit a weight but in the first and the last layer",
        f"above {_told(situation, 1)}",
    )
    return [Proposal("binary", "the smallest that weights can be", (attempt,))]


def _four_do(situation: Situation, margin: float) -> bool:
    limit = _asked_bytes(situation)
    able = "int4" in situation.runtime.FORMS
    return able and limit is not None and _expected_bytes(situation, 4) <= margin * limit


def _asked_bytes(situation: Situation) -> float | None:
    """The size that is asked for, where the file is too large for it with eight bits a weight, and
    can be trained with fewer."""
    size, share = situation.goals.size, situation.share
    too_large = share.left < 1 and share.amount == "parameters"
    if not (situation.integers and situation.trains and too_large and isinstance(size, Limit)):
        return None
    return size.absolute(situation.baseline.size_bytes)


def _expected_bytes(situation: Situation, bits: int) -> float:
    integers, whole = situation.integers, situation.baseline.size_bytes
    assert integers is not None
    return expected_integer_bytes(situation.model, whole, integers, bits)


def _told(situation: Situation, bits: int) -> str:
    size = _expected_bytes(situation, bits)
    return f"{human('size', size)} ({size / situation.baseline.size_bytes:.2f}x)"
