"""Traffic over a rollout, simulated second by second on a clock that is given: for the tests and
the soak. Nothing is mocked: it is the rollout that servers run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from paredown.ship.guard.bound import Bound
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.observation import CANDIDATE, ORIGINAL, Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import Event, Stage

# The same rules in shorter times, so that a rollout takes five minutes of its clock.
QUICK = Policy(steps=(2500, 5000), dwell_s=30.0, soak_s=60.0, window_s=10.0)
BOUND = Bound(rate=0.01, upper=0.02)


class Clock:
    """Seconds that pass when told to; the wall's may jump."""

    def __init__(self) -> None:
        self.now_s, self.wall_s = 1000.0, 1.8e9

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return self.wall_s

    def passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall_s += seconds


@dataclass(frozen=True)
class Model:
    """How a model answers: shares of its answers, and how slow they are."""

    fault: str | None = None
    fault_rate: float = 0.0
    disagreement: float = 0.01  # of the candidate's pairs
    slowness: float = 1.0  # of every answer
    tail: float = 0.0  # the share of answers that is three times as slow
    right: float = 0.9  # the mean score of its labels
    answers: bool = True  # whether anything is observed of it
    compares: bool = True  # whether its pairs are compared


GOOD = Model()


class Simulation:
    """A rollout under traffic.

    Args:
        candidate: how it answers, by the second since the beginning.
        original: the same of the original.
        seed: of everything that is drawn.
        rate: requests a second.
        labels: the share of requests for which a label comes.
        batches: of a second, the sampled inputs; None samples none.
    """

    def __init__(
        self,
        candidate: Model | Callable[[float], Model] = GOOD,
        original: Model = GOOD,
        seed: int = 0,
        rate: int = 50,
        labels: float = 0.0,
        policy: Policy = QUICK,
        bound: Bound = BOUND,
        journal: Journal | None = None,
    ):
        self.clock, self.draws, self.rate = Clock(), np.random.default_rng(seed), rate
        self.original, self.labels = original, labels
        self.candidate = candidate if callable(candidate) else lambda second: candidate
        self.inputs: Callable[[float], np.ndarray] | None = None
        self.second = self.sent = self.faulty_to_clients = 0
        self.events: list[Event] = []
        self.rollout = Rollout(
            policy, bound, journal, "ab12", self.clock.wall, self.clock.monotonic
        )

    def begin(self) -> Simulation:
        """Up to the first shadows."""
        self.rollout.begin()
        self.rollout.validated(True, "simulated")
        return self

    def run(self, seconds: int, until: Stage | None = None) -> Stage:
        """Let time pass, at most until a stage is reached; the stage at the end."""
        for _ in range(seconds):
            self._second()
            if self.rollout.stage is until:
                break
        return self.rollout.stage

    def _second(self) -> None:
        candidate, draws, n = self.candidate(self.second), self.draws, self.rate
        chance = draws.random((n, 6))
        latency = np.exp(draws.normal(1.0, 0.4, (n, 2)))
        for at in range(n):
            self.clock.passes(1 / n)
            route = self.rollout.route(b"%d" % self.sent)
            self.sent += 1
            asked = {route.model} | ({ORIGINAL, CANDIDATE} if route.shadow else set())
            seen = [
                self._answer(name, model, chance[at], latency[at], route.model != name)
                for name, model in ((ORIGINAL, self.original), (CANDIDATE, candidate))
                if name in asked and model.answers
            ]
            if route.shadow and len(seen) == 2 and candidate.compares:
                if not (seen[0].fault or seen[1].fault):
                    seen[1] = replace(seen[1], agreed=bool(chance[at, 2] >= candidate.disagreement))
            for each in seen:
                self.rollout.observe(each)
            if chance[at, 3] < self.labels:
                self._label(candidate, chance[at])
        if self.inputs is not None:
            batch = {"x": self.inputs(self.second)}
            self.rollout.observe(Observation(ORIGINAL, latency_ms=3.0, inputs=batch))
        self.second += 1
        self.events += self.rollout.tick()

    def _answer(
        self, name: str, model: Model, chance: np.ndarray, latency: np.ndarray, shadow: bool
    ) -> Observation:
        own = int(name == CANDIDATE)
        if chance[own] < model.fault_rate:
            self.faulty_to_clients += not shadow
            return Observation(name, fault=model.fault, shadow=shadow)
        slow = model.slowness * (3.0 if chance[4 + own] < model.tail else 1.0)
        return Observation(name, latency_ms=float(latency[own] * slow), shadow=shadow)

    def _label(self, candidate: Model, chance: np.ndarray) -> None:
        """Both right or wrong on the same example, where they are equally good."""
        ours, theirs = float(chance[5] < candidate.right), float(chance[5] < self.original.right)
        self.rollout.observe(Observation(CANDIDATE, score=ours, score_of_other=theirs))
