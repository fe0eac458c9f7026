"""Kills a guarded rollout at random moments, and looks at what is left.

    python -m benchmarks.guard_kills [--kills 2000]

Each child serves simulated traffic with its state on the disk, and tells its stage and weight after
each simulated second. After the kill the state must open, at a weight no lower than was ever served
from then on (it is written before it is raised), in a stage that can follow; and what was told as
rolled back a second before must stay so.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.guard_simulation import BOUND, GOOD, Model, Simulation
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import LIVE, Stage

RULES = Policy(
    steps=(2500, 5000),
    dwell_s=20.0,
    soak_s=20.0,
    window_s=10.0,
    min_canary=50,
    min_pairs=50,
    margin=0.2,
    quiet_share=0.0,
)
ORDER = tuple(Stage)


def serve(path: str, seed: int) -> None:
    """The child: until it is killed."""
    bad_from = random.Random(seed).choice([30, 60, 90, 10**9])
    with Journal.open(path) as journal:
        made = Simulation(
            lambda second: Model("crash", 1.0) if second >= bad_from else GOOD,
            seed=seed,
            policy=RULES,
            journal=journal,
        )
        if made.rollout.stage is Stage.IDLE:
            made.begin()
        while True:
            made.run(1)
            print(made.rollout.stage.name, made.rollout.weight, flush=True)


def killed(path: Path, seed: int) -> tuple[Stage, int] | None:
    """What a child told last before it was killed at random; None where it told nothing."""
    words = [sys.executable, "-m", "benchmarks.guard_kills", "--serve", str(path), str(seed)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    time.sleep(random.Random(seed).uniform(0.0, 0.4))
    child.kill()
    lines += child.stdout.read().splitlines()
    assert child.wait() == -signal.SIGKILL, "the child ended by itself"
    whole = [line.split() for line in lines if len(line.split()) == 2]
    return (Stage[whole[-1][0]], int(whole[-1][1])) if whole else None


def problem(path: Path, told: tuple[Stage, int] | None) -> str:
    """What is wrong with the state after a kill, or nothing."""
    with Journal.open(path) as journal:
        left = Rollout(RULES, BOUND, journal, "ab12")
    if told is None or left.stage is Stage.ROLLED_BACK:
        return ""
    stage, weight = told
    if stage is Stage.ROLLED_BACK:
        return f"told rolled back, and is at {left.stage}"
    if left.weight < weight:
        return f"served {weight}, and {left.weight} is on the disk"
    if stage in LIVE and left.stage in LIVE and ORDER.index(left.stage) < ORDER.index(stage):
        return f"was at {stage}, and is at {left.stage}"
    return ""


def main() -> None:
    """Kill so many times; a state that is rolled back or promoted makes room for a new one."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=2000)
    kills, wrong, ended = asked.parse_args().kills, [], {}
    with tempfile.TemporaryDirectory() as folder:
        path, life = Path(folder) / "0.db", 0
        for seed in range(kills):
            told = killed(path, seed)
            found = problem(path, told)
            wrong += [f"kill {seed}: {found}"] if found else []
            if told and told[0] in (Stage.ROLLED_BACK, Stage.PROMOTED):
                ended[told[0]] = ended.get(told[0], 0) + 1
                life += 1
                path = Path(folder) / f"{life}.db"
    ends = ", ".join(f"{count} {stage}" for stage, count in ended.items())
    print(f"{kills} kills over {life + 1} rollouts ({ends}): {len(wrong)} with a wrong state")
    print("\n".join(wrong))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
