"""Whether latencies may be taken in forks: a file against itself, in forks and in fresh processes.

Each repetition times two files, each of them twice, once in fresh processes and once in forks of a
process that was started for this repetition. Forks share an address layout, so what one repetition
says of itself is compared with how far repetitions lie apart.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import Result, show
from torch import nn

from paredown.core.task import Target
from paredown.graph.capture import capture
from paredown.measure import speedups, stats, timing
from paredown.measure.inputs import deployed_example
from paredown.targets.devices import forks
from paredown.targets.runtimes import runtime

REPETITIONS, QUICK_REPETITIONS = 100, 10
BUDGET_MS = 600.0  # timed inferences of one file; a fifth of what `measure` takes
ROUNDS = (4, 6, 8, 10)  # of the ten that are timed, the first so many
SAME = (("a", "same as a"), ("b", "same as b"))
OTHER = (("a", "b"), ("same as a", "same as b"))
FACTORS = (1.0, 0.75)  # of the width of the two nets


def run(quick: bool, name: str = "onnxruntime") -> list[Result]:
    repetitions = QUICK_REPETITIONS if quick else REPETITIONS
    with tempfile.TemporaryDirectory() as folder:
        files, batches = _files(name, Path(folder))
        found: dict[str, list[dict[str, Any]]] = {"fresh processes": [], "forks": []}
        for number in range(repetitions):
            for kind in found if number % 2 else reversed(found):
                fresh = kind == "fresh processes"
                forks.end()  # so that these forks have a layout of their own
                timed = timing.interleaved(
                    files, Target(name), batches, timing.ROUNDS, BUDGET_MS, fresh=fresh
                )
                found[kind].append({key: each.rounds for key, each in timed.items()})
            print(f"{name}: {number + 1} of {repetitions}", flush=True)
    result = Result(
        f"a file against itself in {name}",
        f"{repetitions} repetitions of 10 rounds of 4 files, 1 thread, kinds taking turns",
    )
    for kind, rounds in found.items():
        result.rows += [_row(kind, rounds, count) for count in ROUNDS]
    show(result, COLUMNS)
    return [result]


def _files(name: str, folder: Path) -> tuple[dict[str, Path], list[list[np.ndarray]]]:
    """Two convolutional nets as files, each twice, and what they are timed on."""
    made, chosen = {}, runtime(name)
    for key, factor in zip("ab", FACTORS, strict=True):
        torch.manual_seed(0)
        width, layers = int(32 * factor), []
        for _ in range(4):
            layers += [nn.LazyConv2d(width, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)).eval()
        example = torch.randn(1, 3, 24, 24)
        net(example)
        model = capture(net, (example,))
        path = chosen.lower(model, folder / key / f"net{chosen.SUFFIX}")
        again = chosen.lower(model, folder / f"{key}2" / f"net{chosen.SUFFIX}")
        made |= {key: path, f"same as {key}": again}
    return made, [deployed_example(model)]


def _row(kind: str, repetitions: list[dict[str, Any]], count: int) -> dict[str, Any]:
    same = [_ratio(each, pair, count) for each in repetitions for pair in SAME]
    other = [[_ratio(each, pair, count) for each in repetitions] for pair in OTHER]
    middles = [np.median([np.log(one.estimate) for one in pair]) for pair in other]
    missed = [
        not np.log(one.low) <= middle <= np.log(one.high)
        for pair, middle in zip(other, middles, strict=True)
        for one in pair
    ]
    sure = [_ratio(each, pair, count, 0.999) for each in repetitions for pair in SAME]
    return {
        "kind": kind,
        "rounds": count,
        "comparisons": len(same),
        "false": float(np.mean([not one.low <= 1 <= one.high for one in same])),
        "false at 99.9 %": float(np.mean([not one.low <= 1 <= one.high for one in sure])),
        "spread of a ratio of 1": float(np.std([np.log(one.estimate) for one in same])),
        "ratio of the two": float(np.exp(np.mean(middles))),
        "missed the ratio of the two": float(np.mean(missed)),
        "spread of the ratio": float(
            np.mean([np.std(np.log([o.estimate for o in p])) for p in other])
        ),
        "reach of an interval": float(
            np.median([np.log(o.high / o.estimate) for p in other for o in p])
        ),
    }


def _ratio(
    timed: dict[str, list[np.ndarray]], pair: tuple[str, str], count: int, sure: float = 0.95
) -> stats.Interval:
    before, after = (timed[name][:count] for name in pair)
    return speedups.median_ratio(before, after, sure)


COLUMNS = {
    "processes": lambda row: row["kind"],
    "rounds": lambda row: str(row["rounds"]),
    "false speed-ups": lambda row: f"{row['false']:.1%} of {row['comparisons']}",
    "at 99.9 %": lambda row: f"{row['false at 99.9 %']:.1%}",
    "their spread": lambda row: f"{row['spread of a ratio of 1']:.4f}",
    "ratio of two files": lambda row: f"{row['ratio of the two']:.3f}",
    "missed by": lambda row: f"{row['missed the ratio of the two']:.1%}",
    "its spread": lambda row: f"{row['spread of the ratio']:.4f}",
    "its interval's reach": lambda row: f"{row['reach of an interval']:.4f}",
}
