"""The guard's full counts; prints the figures that docs/guarding.md gives.

    python -m benchmarks.guard_soak [--rollouts 1000] [--runs 200] [--samples 1000000] [--seeds 50]

1. 200 runs of 1,000,000 samples under no change, at the very limit: how many each test refuses.
2. How soon a change is found: from the start, and after 100,000 good samples.
3. 1,000 simulated rollouts of good candidates: how many are rolled back, or do not get through.
4. Every planted fault with 50 seeds: how many end where they must, and after how long.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable

import numpy as np

from benchmarks.guard_faults import FAULTS, ends
from benchmarks.guard_simulation import Model, Simulation
from paredown.ship.guard.betting import MeanTest, RateTest, RatioTest
from paredown.ship.guard.stages import Stage

BATCH = 100  # samples between two looks
ALPHA = 0.01


def refused(test: RateTest | RatioTest | MeanTest, batches: Iterable[tuple]) -> np.ndarray:
    """After how many batches each run's hypothesis is refused; inf where it never is."""
    found = np.empty(0)
    for at, batch in enumerate(batches, 1):
        test.add(*batch)
        over = test.log_evidence() >= math.log(1 / ALPHA)
        found = found if len(found) else np.full(len(over), np.inf)
        found[over & np.isinf(found)] = at
    return found


def no_change(runs: int, samples: int) -> None:
    """Every test at its limit."""
    draws, looks = np.random.default_rng(0), samples // BATCH
    rate = ((draws.binomial(BATCH, 0.02, runs), BATCH) for _ in range(looks))
    found = refused(RateTest(0.02, (runs,)), rate)
    say(f"disagreement at its limit, 2 %: {np.isfinite(found).sum()} of {runs} runs refused")
    below = ((draws.binomial(BATCH, 0.015, runs), BATCH) for _ in range(looks))
    found = refused(RateTest(0.02, (runs,)), below)
    say(f"disagreement below its limit, 1.5 %: {np.isfinite(found).sum()} of {runs}")
    n = BATCH // 2
    both = (
        (draws.binomial(n, 0.04 * level + 0.001, runs), n, draws.binomial(n, 0.02 * level, runs), n)
        for level in (1 + np.sin(at / 300) * 0.9 for at in range(looks))
    )
    found = refused(RatioTest(2.0, 0.001, (runs,)), both)
    say(f"errors at twice the original's, which swing: {np.isfinite(found).sum()} of {runs}")
    shares = np.array([0.02, 0.95, 0.03])  # the score falls by 1 point, as is allowed
    drops = (
        ((draws.random((runs, BATCH, 1)) > shares.cumsum()[:2]).sum(-1) - 1.0,)
        for _ in range(looks // 4)
    )
    found = refused(MeanTest(0.01, -1.0, (runs,)), drops)
    say(f"score at its limit, a quarter of the samples: {np.isfinite(found).sum()} of {runs}")


def how_soon(runs: int = 2000) -> None:
    """Disagreement that doubles, from the start and late."""
    draws = np.random.default_rng(1)
    for rate in (0.03, 0.04, 0.07):
        batches = ((draws.binomial(10, rate, runs), 10) for _ in range(1500))
        found = 10 * refused(RateTest(0.02, (runs,)), batches)
        within = (found <= 1500).mean()
        say(f"2 % -> {rate:.0%}: {quantiles(found)}; within 1,500 pairs in {within:.1%}")
    for good in (100_000, 1_000_000):
        test = RateTest(0.02, (runs,))
        for _ in range(good // 1000):
            test.add(draws.binomial(1000, 0.02, runs), 1000)
        early = test.log_evidence() >= math.log(1 / ALPHA)
        batches = ((draws.binomial(10, 0.04, runs), 10) for _ in range(1500))
        found = 10 * refused(test, batches)[~early]
        say(f"2 % -> 4 % after {good:,} pairs at 2 %: {quantiles(found)}")


def quantiles(found: np.ndarray) -> str:
    """Median and 95th percentile."""
    late = np.quantile(found, 0.95, method="higher")
    return f"median {np.median(found):,.0f} pairs, 95th percentile {late:,.0f}"


def rollouts(count: int) -> None:
    """Good candidates, with faults and disagreement below their limits."""
    back = held = 0
    seconds = []
    for seed in range(count):
        model = Model("error", 0.0005, disagreement=0.01)
        made = Simulation(model, Model("error", 0.0005), seed=seed).begin()
        stage = made.run(3000, Stage.PROMOTED)
        back += stage is Stage.ROLLED_BACK
        held += stage not in (Stage.PROMOTED, Stage.ROLLED_BACK)
        seconds.append(made.second)
        if stage is not Stage.PROMOTED:
            say(f"  seed {seed}: {stage}: {made.events[-1].reason}")
    say(
        f"{count} good rollouts: {back} rolled back, {held} not through in 3,000 s; "
        f"median {np.median(seconds):,.0f} s"
    )


def faults(seeds: int) -> None:
    """Every planted fault."""
    for name, (_, expected) in FAULTS.items():
        ended = [ends(name, seed) for seed in range(seeds)]
        good = sum(stage is expected for stage, _ in ended)
        took = [second for _, second in ended]
        say(f"{name}: {good} of {seeds} {expected}; {np.median(took):.0f} s, at most {max(took)} s")


def say(text: str) -> None:
    """Print at once: the whole takes a while."""
    print(text, flush=True)


def main() -> None:
    """Run all four."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("rollouts", 1000), ("runs", 200), ("samples", 10**6), ("seeds", 50)):
        asked.add_argument(f"--{name}", type=int, default=value)
    given = asked.parse_args()
    started = time.monotonic()
    no_change(given.runs, given.samples)
    how_soon()
    rollouts(given.rollouts)
    faults(given.seeds)
    say(f"done in {time.monotonic() - started:,.0f} s")


if __name__ == "__main__":
    main()
