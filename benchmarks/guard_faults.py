"""Twenty faults that are planted in a candidate, for the tests and the soak."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.guard_simulation import BOUND, GOOD, QUICK, Model, Simulation
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.observation import CANDIDATE, Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.profile import Profile
from paredown.ship.guard.stages import Stage

GIVEN_S = 900  # simulated seconds that a fault is given
AT_S = 40  # when those begin that begin late: in the canary


def _late(model: Model) -> Callable[[float], Model]:
    return lambda second: model if second >= AT_S else GOOD


def _policy(**changes: object) -> Policy:
    given = {name: getattr(QUICK, name) for name in QUICK.__dataclass_fields__}
    return Policy(**{**given, **changes})  # type: ignore[arg-type]


# name -> (how the candidate answers, where the rollout must end)
FAULTS: dict[str, tuple[Callable[[float], Model] | Model, Stage]] = {
    "crashes always": (Model("crash", 1.0), Stage.ROLLED_BACK),
    "crashes from the canary on": (_late(Model("crash", 1.0)), Stage.ROLLED_BACK),
    "crashes in one of ten": (Model("crash", 0.1), Stage.ROLLED_BACK),
    "NaN in one of fifty": (Model("nan", 0.02), Stage.ROLLED_BACK),
    "NaN from the canary on": (_late(Model("nan", 0.05)), Stage.ROLLED_BACK),
    "wrong shape always": (Model("shape", 1.0), Stage.ROLLED_BACK),
    "wrong shape at times": (_late(Model("shape", 0.03)), Stage.ROLLED_BACK),
    "hangs": (_late(Model("deadline", 1.0)), Stage.ROLLED_BACK),
    "hangs at times": (Model("deadline", 0.05), Stage.ROLLED_BACK),
    "errors in one of twenty": (Model("error", 0.05), Stage.ROLLED_BACK),
    "errors from the canary on": (_late(Model("error", 0.2)), Stage.ROLLED_BACK),
    "one class of ten is wrong": (Model(disagreement=0.1), Stage.ROLLED_BACK),
    "twice the disagreement": (Model(disagreement=0.04), Stage.ROLLED_BACK),
    "answers at random": (_late(Model(disagreement=0.9)), Stage.ROLLED_BACK),
    "five times as slow": (Model(slowness=5.0), Stage.ROLLED_BACK),
    "half as slow again": (Model(slowness=1.5), Stage.ROLLED_BACK),
    "slow in one of ten": (Model(tail=0.1), Stage.ROLLED_BACK),
    "says nothing": (Model(answers=False), Stage.ROLLED_BACK),
    "worker dies in the canary": (_late(Model(answers=False)), Stage.ROLLED_BACK),
    "pairs are not compared": (_late(Model(compares=False)), Stage.ROLLED_BACK),
    "loses five points": (Model(right=0.85), Stage.ROLLED_BACK),
    "memory leaks": (GOOD, Stage.ROLLED_BACK),
    "queue grows": (GOOD, Stage.ROLLED_BACK),
    "inputs drift": (GOOD, Stage.PAUSED),
}


def planted(name: str, seed: int) -> Simulation:
    """The simulation of one fault, begun."""
    candidate, _ = FAULTS[name]
    policy, bound = QUICK, BOUND
    if name == "memory leaks":
        policy = _policy(memory_bytes=2**30)
    if name == "queue grows":
        policy = _policy(queue=100)
    if name == "inputs drift":
        policy = _policy(min_drift=200)
        usual = np.random.default_rng(seed).normal(size=(2000, 8))
        bound = Bound(BOUND.rate, BOUND.upper, Profile.of([{"x": usual}]))
    labels = 0.3 if name == "loses five points" else 0.0
    made = Simulation(candidate, seed=seed, labels=labels, policy=policy, bound=bound)
    if name == "inputs drift":
        made.inputs = lambda second: made.draws.normal(second >= AT_S, 1.0, (32, 8))
    return made.begin()


def ends(name: str, seed: int) -> tuple[Stage, int]:
    """Where a fault's rollout ends, and after how many seconds."""
    made, (_, expected) = planted(name, seed), FAULTS[name]
    while made.second < GIVEN_S and made.rollout.stage is not expected:
        if name == "memory leaks":
            made.rollout.gauge(memory_bytes=2**29 + made.second * 2**23)
        if name == "queue grows":
            made.rollout.gauge(queue=float(max(0, made.second - AT_S) * 5))
        made.run(1)
    return made.rollout.stage, made.second


def hears_nothing_wrong(made: Simulation) -> bool:
    """Whether observations that make no sense leave the rollout where it is."""
    before = made.rollout.stage
    for odd in (float("nan"), -1.0, float("inf")):
        made.rollout.observe(Observation(CANDIDATE, latency_ms=odd))
    made.rollout.observe(Observation(CANDIDATE, score=2.0))
    made.rollout.tick()
    return made.rollout.stage is before
