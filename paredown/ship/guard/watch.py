"""The guards that look once a window: whether data come, budgets hold, and inputs are as before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paredown.core.units import amount, human
from paredown.ship.guard.drift import Distance, distance
from paredown.ship.guard.features import MOST_NUMBERS, of_batches
from paredown.ship.guard.finding import Finding, State
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.profile import Profile
from paredown.ship.guard.stages import Stage
from paredown.ship.guard.tally import Batch
from paredown.ship.guard.windows import Window


class Data:
    """Whether there is anything to judge by. Silence is never a pass: it pauses, then rolls back.

    After promotion a window without any request is no silence: nobody asked.
    """

    name = "data"

    def __init__(self, policy: Policy):
        self._policy = policy
        self.silent = 0  # windows without data in a row
        self._lacking = ""
        self.entered()

    def entered(self) -> None:
        """A new stage, or the end of a pause: windows are counted anew, with data and without.

        The guard itself goes on only where data come, so that a hand alone ends a silence.
        """
        self._good = self.silent = 0

    def window(self, window: Window, where: Stage) -> None:
        """Look at a window that has ended."""
        if where is Stage.PROMOTED and window.idle:
            return
        self._lacking = self._lacks(window, where)
        self.silent = self.silent + 1 if self._lacking else 0
        self._good += not self._lacking

    def _lacks(self, window: Window, where: Stage) -> str:
        if not window.candidate.seen:
            return "answers of the candidate"
        if self._policy.min_pairs and not window.pairs:
            return "shadowed pairs"
        good = window.candidate.answers > window.candidate.faulty
        if where is Stage.CANARY and good and not window.candidate.latency.any():
            return "latencies"
        return ""

    def finding(self, where: Stage) -> Finding:
        """What it says; a fail pauses first and rolls back later."""
        pause, back = self._policy.no_data_pause, self._policy.no_data_rollback
        state: State = "pass" if self._good and not self.silent else "no evidence"
        if self.silent >= pause:
            state = "fail"
        action = "roll back" if self.silent >= back else "pause"
        says = (
            f"data in {amount(self._good, 'windows')}" if self._good else "the first window is open"
        )
        if self.silent:
            silent = amount(self.silent, "windows")
            says = f"no {self._lacking} for {silent}; {pause} pause, {back} roll back"
        return Finding(self.name, state, True, self.silent, pause, self._good, 1, says, action)


class Budget:
    """Memory, or the queue, of the candidate: over budget for some windows in a row rolls back."""

    def __init__(self, name: str, most: int, policy: Policy):
        self.name, self._most, self._over_limit = name, most, policy.over_budget
        self._over = 0
        self.entered()

    def entered(self) -> None:
        """A new stage: windows are counted anew."""
        self._windows, self._last = 0, 0.0

    def window(self, value: float | None) -> None:
        """Look at the most that was told in a window; None where nothing was."""
        if value is not None:
            self._windows += 1
            self._last = value
            self._over = self._over + 1 if self._most and value > self._most else 0

    def finding(self, where: Stage) -> Finding:
        """What it says."""
        state: State = "pass" if self._windows and not self._over else "no evidence"
        if self._over >= self._over_limit:
            state = "fail"
        says = f"{self._told(self._last)} at the most in the last window"
        if not self._windows:
            says = "nothing was told"
        if self._over:
            says += f", over {self._told(self._most)} for {amount(self._over, 'windows')}"
        asked, evidence = self._most > 0, self._last if self._windows else None
        limit = self._most if asked else None
        return Finding(self.name, state, asked, evidence, limit, self._windows, 1, says)

    def _told(self, value: float) -> str:
        return human("memory", value) if self.name == "memory" else f"{value:,.0f}"


class Drift:
    """Inputs, or the candidate's outputs, beside the histograms kept with the artifact.

    Both models see the same inputs, so no model is at fault: a drift pauses.

    Args:
        kind: "input" or "output".
    """

    def __init__(self, kind: str, profile: Profile | None, policy: Policy):
        self.name, self._kind, self._policy = f"{kind} drift", kind, policy
        there = profile.histograms.items() if profile is not None else ()
        self._reference = {key: each for key, each in there if key.startswith(f"{kind} ")}
        self._live: dict[str, np.ndarray] = {}
        self._examples: dict[str, int] = {}
        self.distances: dict[str, Distance] = {}  # of the last comparison
        self.unknown: set[str] = set()  # features that the profile has not
        self.entered()

    def entered(self) -> None:
        """A new stage: windows are counted anew, and what came before is forgotten."""
        self._drifted = self._compared = 0
        self._live.clear()
        self._examples.clear()

    def update(self, batches: Sequence[Batch]) -> None:
        """Count the sampled batches of a tick, as many as take no longer than a tick may."""
        if not self._reference:
            return
        numbers = 0
        for batch in batches:
            if numbers > MOST_NUMBERS:
                return
            numbers += sum(np.size(each) for each in batch.values())
            for key, (values, examples) in of_batches(batch, self._kind).items():
                reference = self._reference.get(key)
                if reference is None:
                    if len(self.unknown) < 100:
                        self.unknown.add(key)
                    continue
                counts = reference.counted(values)
                self._live[key] = self._live.get(key, 0) + counts
                self._examples[key] = self._examples.get(key, 0) + examples

    def window(self) -> None:
        """At a window's end: compare, where enough examples have come since the last time."""
        if max(self._examples.values(), default=0) < self._policy.min_drift:
            return
        self.distances = {
            key: distance(self._reference[key].counts, counts, self._reference[key].examples, n)
            for key, counts in self._live.items()
            if (n := self._examples[key]) and counts.sum()
        }
        self._live.clear()
        self._examples.clear()
        self._compared += 1
        far = any(each.beyond(self._policy.psi) for each in self.distances.values())
        self._drifted = self._drifted + 1 if far else 0

    def finding(self, where: Stage) -> Finding:
        """What it says; a fail pauses."""
        n, needed = max(self._examples.values(), default=0), self._policy.min_drift
        state: State = "pass" if self._compared and not self._drifted else "no evidence"
        if self._drifted >= self._policy.drifted:
            state = "fail"
        asked, worst = bool(self._reference), self._worst()
        says = f"{n:,} of {needed:,} examples" if asked else "no profile to compare with"
        if worst:
            psi = self.distances[worst].psi
            says = f"{worst}: index {psi:.2f}, {self._policy.psi:g} is allowed"
            says += (
                f"; above it in {amount(self._drifted, 'windows')} in a row"
                if self._drifted
                else ""
            )
        index = self.distances[worst].psi if worst else None
        if self._compared:
            n = needed
        return Finding(self.name, state, asked, index, self._policy.psi, n, needed, says, "pause")

    def _worst(self) -> str:
        return max(self.distances, key=lambda key: self.distances[key].psi, default="")

    def to_json(self) -> dict[str, Any]:
        """Each feature's distance at the last comparison, for the page."""
        return {
            key: {
                "psi": each.psi,
                "ks": each.ks,
                "ks_chance": each.ks_chance,
                "drifted": each.beyond(self._policy.psi),
            }
            for key, each in self.distances.items()
        }
