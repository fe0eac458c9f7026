"""Faults that need no statistics: several in a row, or a burst."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from paredown.ship.guard.observation import CANDIDATE, HARD, ORIGINAL
from paredown.ship.guard.policy import Policy


@dataclass
class Faults:
    """Faults that roll back at once: several in a row, or a burst of hard ones.

    Where the original has as many, going back to it would help nobody: the rollout pauses.

    Example:
        >>> faults = Faults(Policy())
        >>> [faults.seen("candidate", "nan", at) for at in (0.0, 1.0, 2.0)][-1]
        ('roll back', '3 hard faults (nan) within 10 s')
    """

    policy: Policy
    row: int = 0
    _hard: deque[float] = field(default_factory=deque)  # when the candidate's last ones came
    _rates: dict[str, Recent] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._hard = deque(maxlen=self.policy.faults_in_burst)

    def seen(self, model: str, fault: str | None, now: float) -> tuple[str, str] | None:
        """Count one answer; the action and its reason, where one is due.

        Args:
            now: by the monotonic clock, in seconds.
        """
        self._rates.setdefault(model, Recent(self.policy.burst_s)).add(fault is not None, now)
        if model != CANDIDATE:
            return None
        self.row = self.row + 1 if fault else 0
        if fault is None:
            return None
        if fault in HARD:
            self._hard.append(now)
        burst = sum(abs(now - at) <= self.policy.burst_s for at in self._hard)
        if self.row >= self.policy.faults_in_row:
            return self._action(f"{self.row} faults in a row, the last one: {fault}")
        if fault in HARD and burst >= self.policy.faults_in_burst:
            return self._action(f"{burst} hard faults ({fault}) within {self.policy.burst_s:g} s")
        return None

    def _action(self, reason: str) -> tuple[str, str]:
        ours, theirs = self._rates[CANDIDATE], self._rates.get(ORIGINAL)
        both = theirs is not None and ours.share <= self.policy.error_ratio * theirs.share
        return ("pause", f"{reason}; the original fails as well") if both else ("roll back", reason)


@dataclass
class Recent:
    """The share of faults among the answers of about the last ``span_s`` seconds.

    Example:
        >>> recent = Recent(span_s=10.0)
        >>> for at in range(4):
        ...     recent.add(at == 0, 0.0)
        >>> recent.share
        0.25
    """

    span_s: float
    answers: float = 0.0
    faults: float = 0.0
    last: float = 0.0

    def add(self, faulty: bool, now: float) -> None:
        """Count one; older ones fade."""
        fade = math.exp(-max(0.0, now - self.last) / self.span_s)
        self.answers, self.faults = self.answers * fade + 1, self.faults * fade + faulty
        self.last = now

    @property
    def share(self) -> float:
        """Of the answers that have not faded."""
        return self.faults / self.answers if self.answers else 0.0
