"""What a guard says of the candidate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["pass", "fail", "no evidence"]


@dataclass(frozen=True)
class Finding:
    """What a guard says now. No evidence is never a pass.

    Args:
        name: of the guard.
        state: "pass", "fail" or "no evidence".
        asked: whether the rollout waits for it at this stage.
        evidence: the number that it goes by, None where there is none yet.
        limit: what that number is held against.
        n: how many samples it has at this stage.
        needed: how many it needs.
        says: in words; of a guard that does not pass, what is missing.
        action: what a fail does: "roll back" or "pause".

    Example:
        >>> Finding("faults", "no evidence", True, None, 5, 0, 460, "...").action
        'roll back'
    """

    name: str
    state: State
    asked: bool
    evidence: float | None
    limit: float | None
    n: int
    needed: int
    says: str
    action: str = "roll back"


def wealth(log_evidence: float) -> float:
    """Evidence as a number to show, at most 1e12."""
    return math.exp(min(log_evidence, math.log(1e12)))
