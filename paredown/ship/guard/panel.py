"""All guards together."""

from __future__ import annotations

from typing import Any

from paredown.ship.guard.faults import Faults
from paredown.ship.guard.finding import Finding
from paredown.ship.guard.guards import Disagreement, Errors, Latency, Score
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.profile import Profile
from paredown.ship.guard.stages import Stage
from paredown.ship.guard.tally import Tally
from paredown.ship.guard.watch import Budget, Data, Drift
from paredown.ship.guard.windows import Window


class Panel:
    """Every guard of GUARD's table; `faults` alone is asked while serving, the others at ticks.

    Example:
        >>> panel = Panel(Policy(), upper=0.02, profile=None)
        >>> [each.name for each in panel.findings(Stage.CANARY) if each.asked]
        ['error rate', 'disagreement', 'latency', 'data']
    """

    def __init__(self, policy: Policy, upper: float, profile: Profile | None):
        self.faults = Faults(policy)
        self.tests = (Errors(policy), Disagreement(policy, upper), Latency(policy), Score(policy))
        self.memory = Budget("memory", policy.memory_bytes, policy)
        self.queue = Budget("queue", policy.queue, policy)
        self.drifts = (Drift("input", profile, policy), Drift("output", profile, policy))
        self.data = Data(policy)

    def entered(self) -> None:
        """A new stage begins: what it asks for is counted anew."""
        for guard in (*self.tests, self.memory, self.queue, *self.drifts, self.data):
            guard.entered()

    def update(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        for test in self.tests:
            test.update(tally)
        for drift, batches in zip(self.drifts, (tally.inputs, tally.outputs), strict=True):
            drift.update(batches)

    def window(self, window: Window, where: Stage) -> None:
        """Look at a window that has ended."""
        self.data.window(window, where)
        self.memory.window(window.memory_bytes)
        self.queue.window(window.queue)
        for drift in self.drifts:
            drift.window()

    def findings(self, where: Stage) -> list[Finding]:
        """What each says at a stage."""
        guards = (*self.tests, self.memory, self.queue, *self.drifts, self.data)
        return [guard.finding(where) for guard in guards]

    def drift(self) -> dict[str, Any]:
        """Each feature's distance from the profile, for the page."""
        return {key: value for each in self.drifts for key, value in each.to_json().items()}

    def to_json(self) -> dict[str, Any]:
        """The tests' wealth, which a restart goes on from."""
        return {test.name: test.to_json() for test in self.tests}

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from what `to_json` gave.

        Raises:
            KeyError, TypeError, ValueError: it did not.
        """
        for test in self.tests:
            test.restore(told[test.name])
