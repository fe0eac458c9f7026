"""Seconds of the steps that look at calibration data, and what comes out, on nets of known shapes.

Each measurement is a fresh process with one thread that has captured the net and warmed up on a
tiny one. With ``BESIDE=CHECKOUT`` in the environment the paredown of another checkout takes turns.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any

import numpy as np
import shapes
import tables
import torch
from tables import Result
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import paredown
from paredown.targets.devices.probe import peak_bytes

ROUNDS, QUICK_ROUNDS = 5, 1
EXAMPLES, HELD_OUT, SETTLING = 64, 32, 64  # for calibration and validation each; images
ALLOWED = "0.1%"  # of the outputs' energy may be noise in mixed precision


@dataclass(frozen=True)
class Case:
    """A step on the net called so in `shapes.SHAPES`."""

    net: str
    step: paredown.Step


CASES = {
    "low rank": Case("resnet18", paredown.LowRank(0.5)),
    "low rank, plain SVD": Case(
        "resnet18", paredown.LowRank(0.5, method="channel", whiten=False, reconstruct=False)
    ),
    "GPTQ": Case("resnet18", paredown.QuantizeWeights(4)),
    "GPTQ, BERT": Case("bert-small", paredown.QuantizeWeights(4)),
    "mixed precision": Case("resnet18", paredown.Quantize("int8", max_drop=ALLOWED)),
    "fp16": Case("resnet18", paredown.Cast("fp16")),
}


def run(quick: bool) -> list[Result]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    beside = os.environ.get("BESIDE")
    checkouts = {"this": str(tables.ROOT)} | ({"beside": beside} if beside else {})
    found: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, key): [] for name in CASES for key in checkouts
    }
    for number in range(rounds):
        for name, key in list(found)[:: -1 if number % 2 else 1]:
            found[name, key].append(_in_child(name, checkouts[key]))
            print(name, key, found[name, key][-1], flush=True)
    result = Result(
        "seconds of steps",
        f"one thread; {EXAMPLES} examples for calibration and validation each, {HELD_OUT} others "
        f"for the signal-to-noise ratio; median (lowest-highest of {rounds} fresh processes)",
        [_row(name, key, runs) for (name, key), runs in found.items()],
    )
    tables.show(result, COLUMNS)
    return [result]


def _in_child(name: str, checkout: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, name],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def child(name: str) -> dict[str, Any]:
    """Seconds of one step in this process, and what its model is worth."""
    torch.set_num_threads(1)
    case = CASES[name]
    case.step.apply(*_tiny())
    settling = None if case.net in shapes.TRANSFORMERS else shapes.inputs(case.net, SETTLING, 3)
    module = shapes.build(case.net, settling)
    task = _task(module, *(shapes.inputs(case.net, EXAMPLES, seed) for seed in (1, 4)))
    model = paredown.capture(module, task.example, task.dynamic)
    cpu, wall = process_time(), perf_counter()
    made = case.step.apply(model, task)
    cpu, wall = process_time() - cpu, perf_counter() - wall
    peak = peak_bytes()
    images = shapes.inputs(case.net, HELD_OUT, 2)
    return {
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_mb": (peak or 0) / 1e6,
        "snr_db": _snr_db(module, made, images),
        "parameters": sum(p.numel() for p in made.parameters()),
        "notes": [str(note) for note in made.notes],
        "weights": {
            key: [*value.shape]
            for key, value in made.state_dict().items()
            if key.endswith(("_down", "_core", "_up", "_scale"))
        },
    }


def _tiny() -> tuple[paredown.Model, paredown.Task]:
    """A net with a layer of each kind, to import and set up all that a step needs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 4 * 4, 64)).eval()
    task = _task(net, torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8), loose=True)
    return paredown.capture(net, task.example, task.dynamic), task


def _task(
    module: nn.Module, seen: Tensor, validation: Tensor, loose: bool = False
) -> paredown.Task:
    with torch.no_grad():
        outputs = torch.cat([module(part) for part in validation.split(16)])
    unlabelled: Dataset = TensorDataset(seen, torch.zeros(len(seen)))
    return paredown.Task(
        example=(seen[:1],),
        score=_alike_loosely if loose else _alike,
        calibration=unlabelled,
        validation=TensorDataset(validation, outputs),
    )


def _alike(output: Tensor, target: Tensor) -> Tensor:
    """The share of the output's energy that is no noise, (B,)."""
    return 1 - (output - target).square().sum(1) / target.square().sum(1)


def _alike_loosely(output: Tensor, target: Tensor) -> Tensor:
    return torch.ones(len(output))


def _snr_db(module: nn.Module, made: paredown.Model, inputs: Tensor) -> float:
    with torch.no_grad():
        exact, found = (torch.cat([f(x) for x in inputs.split(8)]) for f in (module, made))
    return 10 * math.log10(float(exact.square().sum() / (found - exact).square().sum()))


def _row(name: str, key: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"step": name, "checkout": key} | {
        field: [run[field] for run in runs] for field in runs[0]
    }


COLUMNS = {
    "step": lambda row: row["step"],
    "checkout": lambda row: row["checkout"],
    "CPU seconds": lambda row: tables.spread(row["cpu_s"]),
    "wall seconds": lambda row: tables.spread(row["wall_s"]),
    "peak memory, MB": lambda row: tables.spread(row["peak_mb"], 0),
    "SNR, dB": lambda row: f"{np.median(row['snr_db']):.2f}",
    "parameters": lambda row: f"{row['parameters'][-1]:,}",
}

if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
