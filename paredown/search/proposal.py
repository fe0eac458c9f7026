"""What is planned: attempts, and proposals made of them."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.steps.step import Step


@dataclass(frozen=True)
class Attempt:
    """Steps that are tried, measured, and kept or undone together.

    The first compresses, the rest recover accuracy.
    """

    steps: tuple[Step, ...]
    title: str
    reason: str
    expected: str


@dataclass(frozen=True)
class Proposal:
    """Attempts in order, with the reason for this order."""

    title: str
    reason: str
    attempts: tuple[Attempt, ...]

    @property
    def steps(self) -> list[Step]:
        return [step for attempt in self.attempts for step in attempt.steps]
