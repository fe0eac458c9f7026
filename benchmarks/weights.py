"""Quantization of the code model by exported file: weights alone, and with activations."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch.utils.data import DataLoader

import paredown
from paredown.graph.model import Model
from paredown.measure.stats import Interval, paired_difference
from paredown.targets.runtimes import onnxruntime

sys.path.insert(0, str(tables.ROOT / "examples"))
FORMS = ((8, 0), (4, 32), (4, 64), (4, 128), (4, 0))  # bits, and weights to a scale
QUICK = ((8, 0), (4, 32), (4, 128))
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "weights": lambda row: row["weights"],
    "rounded": lambda row: row["rounded"],
    "MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    "bits per byte added": lambda row: row["added"],
    "points of accuracy": lambda row: row["points"],
}


@dataclass(frozen=True)
class File:
    """Next-byte accuracy and bits per byte of each test window (N,), and the file's bytes."""

    accuracy: np.ndarray
    bits: np.ndarray
    bytes: int


def run(quick: bool) -> list[tables.Result]:
    import code_lm

    task = code_lm.task()
    model = paredown.capture(code_lm.model(), task.example, task.dynamic)
    count = 500 if quick else code_lm.WINDOWS["test"]
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        whole = _measured(model, path, count)
        rows.append(_row("float32", "", whole, None))
        for scheme in ("int8", "int8-dynamic"):
            found = _measured(paredown.Quantize(scheme).apply(model, task), path, count)
            rows.append(_row(f"{scheme}, and activations", "rtn", found, whole))
            print(rows[-1], flush=True)
        for bits, group in QUICK if quick else FORMS:
            named = f"int{bits}, {f'groups of {group}' if group else 'per channel'}"
            by: dict[str, File] = {}
            for method in ("rtn", "gptq"):
                step = paredown.QuantizeWeights(bits, group, method=method)
                by[method] = _measured(step.apply(model, task), path, count)
                rows.append(_row(named, method, by[method], whole))
                print(rows[-1], flush=True)
            if bits == 4:
                less = paired_difference(by["rtn"].bits, by["gptq"].bits)
                bars.append(tables.at_most(f"{named}: GPTQ less rounding to nearest", less, 0.0))
    result = tables.Result(
        "quantization of the code model",
        f"{onnxruntime.version()}; {count} test windows of 128 bytes, paired, 95 % intervals",
        rows,
        bars,
    )
    tables.show(result, COLUMNS)
    return [result]


def _measured(model: Model, path: Path, count: int) -> File:
    import code_lm

    file = onnxruntime.lower(model, path)
    predict = onnxruntime.open(file, tables.cores())
    windows = code_lm.Windows(code_lm.texts()["test"], count)
    right, bits = [], []
    for inputs, target in DataLoader(windows, code_lm.BATCH):
        output = torch.from_numpy(predict(inputs.numpy())[0])
        right.append(paredown.token_accuracy(output, target))
        bits.append(code_lm.bits_per_byte(output, target))
    return File(torch.cat(right).numpy(), torch.cat(bits).numpy(), file.stat().st_size)


def _row(named: str, method: str, found: File, whole: File | None) -> dict[str, Any]:
    added, points = f"{found.bits.mean():.4f} in all", f"{found.accuracy.mean():.2%} in all"
    if whole is not None:
        added = _spelled(paired_difference(whole.bits, found.bits), 1.0)
        points = _spelled(paired_difference(whole.accuracy, found.accuracy), 100.0)
    return {
        "weights": named,
        "rounded": {"rtn": "to nearest", "gptq": "GPTQ"}.get(method, ""),
        "bytes": found.bytes,
        "added": added,
        "points": points,
    }


def _spelled(found: Interval, scale: float) -> str:
    ends = (found.estimate, found.low, found.high)
    estimate, low, high = (f"{scale * end:+.4f}" for end in ends)
    return f"{estimate} ({low} to {high})"
