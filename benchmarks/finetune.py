"""One training step on a captured graph beside the same step on the plain module."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import shapes
import tables
import torch
from tables import Result
from torch import Tensor, nn
from torch.nn import functional

import paredown
from paredown.measure import speedups

THREADS = 1
BATCH = 16
PLAIN, CAPTURED = "plain module", "captured graph"
ROUNDS, TURN_S, WARMUP = 10, 2.0, 3
QUICK_ROUNDS, QUICK_TURN_S = 4, 0.5
BOUND = 1.05


def run(quick: bool) -> list[Result]:
    return [_compare(name, quick) for name in EXAMPLES]


def _compare(name: str, quick: bool) -> Result:
    rounds, turn_s = (QUICK_ROUNDS, QUICK_TURN_S) if quick else (ROUNDS, TURN_S)
    found: dict[str, list[np.ndarray]] = {PLAIN: [], CAPTURED: []}
    for number in range(rounds):
        for key, milliseconds in _in_child(name, number % 2 == 1, turn_s).items():
            found[key].append(np.array(milliseconds))
    ratio = speedups.median_ratio(found[CAPTURED], found[PLAIN])
    result = Result(
        f"finetune: {name}, batch {BATCH}, forward + loss + backward + AdamW",
        f"torch {tables.versions()['torch']}, {THREADS} thread; median (lowest-highest median of "
        f"{rounds} rounds, each a fresh process where the two take turns)",
        [
            {
                "name": key,
                "step": tables.spread(times, 1),
                "rounds_ms": [np.median(each) for each in times],
                "ratio": tables.spell(ratio) if key == CAPTURED else "1",
            }
            for key, times in found.items()
        ],
        [tables.at_most("a step at most 1.05 x the plain module's", ratio, BOUND)],
    )
    tables.show(result, COLUMNS)
    return result


def _in_child(name: str, captured_first: bool, turn_s: float) -> dict[str, list[float]]:
    command = [sys.executable, __file__, name, str(int(captured_first)), str(turn_s)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"finetune {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def _images() -> tuple[nn.Module, Tensor, Tensor]:
    return shapes.ResNet18(), shapes.photographs(BATCH, 64, seed=0), torch.arange(BATCH)


def _tokens() -> tuple[nn.Module, Tensor, Tensor]:
    return shapes.Encoder(), torch.randint(0, 8192, (BATCH, 64)), torch.arange(BATCH) % 2


EXAMPLES: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "resnet18 at 64 px": _images,
    "encoder of 64 tokens": _tokens,
}


def child(name: str, captured_first: bool, turn_s: float) -> dict[str, list[float]]:
    """Milliseconds of each step, the two taking turns in this process."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    module, inputs, target = EXAMPLES[name]()
    captured = paredown.capture(module, (inputs[:1],)).train()
    steps = {
        PLAIN: _step(module.train(), list(module.parameters()), inputs, target),
        CAPTURED: _step(captured, list(captured.parameters()), inputs, target),
    }
    order = list(steps)[::-1] if captured_first else list(steps)
    for key in order:
        for _ in range(WARMUP):
            last = _timed(steps[key])
    count = max(2, round(turn_s * 1e3 / last / 2))
    found: dict[str, list[float]] = {key: [] for key in steps}
    for key in [*order, *order[::-1]]:
        found[key] += [_timed(steps[key]) for _ in range(count)]
    return found


def _step(model: Any, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None]) -> float:
    start = perf_counter()
    step()
    return 1e3 * (perf_counter() - start)


COLUMNS = {
    "model": lambda row: row["name"],
    "step, ms": lambda row: row["step"],
    "captured / plain": lambda row: row["ratio"],
}

if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2] == "1", float(sys.argv[3]))))
