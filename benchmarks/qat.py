"""What training through the rounding wins back, by what the scales do meanwhile.

Digits and the code model, weights of 8 and 4 bits, three seeds; each number is of the exported file
in ONNX Runtime, on examples that nothing was trained or chosen on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import paredown
from paredown.core.task import Task
from paredown.graph.model import Model
from paredown.targets.runtimes import onnxruntime
from paredown.train import qat

sys.path.insert(0, str(tables.ROOT / "examples"))
SEEDS = 3
SCHEMES = (("int8", 8), ("int4", 8), ("int4", 4))  # and the bits of the first and last layer
TRAINING = {"digits": {"epochs": 3, "lr": 1e-3}, "code_lm": {"epochs": 0.25, "lr": 5e-4}}
HELD = {"digits": 400, "code_lm": 500}  # test examples
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "weights": lambda row: row["weights"],
    "scales": lambda row: row["scales"],
    "score": lambda row: row["score"],
    "loss": lambda row: row["loss"],
    "against float": lambda row: row["against float"],
    "bytes": lambda row: f"{row['bytes']:,}",
}


def run(quick: bool) -> list[tables.Result]:
    return [_table(name) for name in (("digits",) if quick else TRAINING)]


def _table(name: str) -> tables.Result:
    task, model = _example(name)
    settings = TRAINING[name]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model.onnx"
        rows = [_row("float", "", [_measured(name, model, task, made)], None)]
        before = rows[0]["losses"][0]
        for scheme, edges in SCHEMES:
            weights = scheme if scheme == "int8" else f"{scheme}, edges {edges} bits"
            quantized = paredown.Quantize(scheme, edge_bits=edges).apply(model, task)
            found = [_measured(name, quantized, task, made)]
            rows.append(_row(weights, "not trained", found, before))
            for kind in qat.KINDS:
                found = []
                for seed in range(SEEDS):
                    step = paredown.FineTune(**settings, quantizers=kind, seed=seed)  # type: ignore[arg-type]
                    tuned = step.apply(quantized, replace(task, validation=None))
                    found.append(_measured(name, tuned, task, made))
                rows.append(_row(weights, kind, found, before))
                print(rows[-1]["weights"], kind, rows[-1]["score"], rows[-1]["loss"], flush=True)
    result = tables.Result(
        f"training through the rounding: {name}, {settings['epochs']} epochs at {settings['lr']}",
        f"{HELD[name]} test examples through the exported file; mean of {SEEDS} seeds "
        "(lowest-highest); loss in nats",
        rows,
    )
    tables.show(result, COLUMNS)
    return result


def _example(name: str) -> tuple[Task, Model]:
    module = __import__(name)
    task = module.task()
    return task, paredown.capture(module.model(), task.example, task.dynamic)


def _measured(name: str, model: Model, task: Task, path: Path) -> tuple[float, float, int]:
    """Mean score and loss of the exported file, and its bytes."""
    predict = onnxruntime.open(onnxruntime.lower(model, path), tables.cores())
    held = Subset(task.test, range(HELD[name]))  # type: ignore[arg-type]
    scores: list[Tensor] = []
    losses = []
    for inputs, target in DataLoader(held, 50):
        output = torch.from_numpy(predict(inputs.numpy())[0])
        scores.append(task.score(output, target))
        losses.append(float(task.loss(output, target)))  # type: ignore[misc]
    return float(torch.cat(scores).mean()), float(np.mean(losses)), path.stat().st_size


def _row(
    weights: str, scales: str, found: list[tuple[float, float, int]], before: float | None
) -> dict[str, Any]:
    scores, losses, sizes = (list(each) for each in zip(*found, strict=True))
    loss = float(np.mean(losses))
    return {
        "weights": weights,
        "scales": scales,
        "scores": scores,
        "losses": losses,
        "bytes": max(sizes),
        "score": tables.spread([100 * s for s in scores]) + " %",
        "loss": tables.spread(losses, 4),
        "against float": "" if before is None else f"{loss - before:+.4f}",
    }
