"""Deep Compression's stages on digits, each alone and together; and sharing beside hashing."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from tables import Bar, Result

import paredown
from paredown import FineTune, HashWeights, ShareWeights
from paredown.core.task import Task
from paredown.graph.model import Model
from paredown.measure import stats
from paredown.ship.pack.container import packed_bytes
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.targets.runtimes import onnxruntime

sys.path.insert(0, str(tables.ROOT / "examples"))
SMALLER = 50  # times, than float32 on disk: what the two recipes are for
NETS = {"LeNet300": "deep_compression_lenet_300", "LeNet5": "deep_compression_lenet_5"}


def run(quick: bool) -> list[Result]:
    torch.set_num_threads(1)
    results = []
    for kind in list(NETS)[: 1 if quick else None]:
        results += [_stages(kind), *([] if quick else [_variants(kind)])]
    return results


def _stages(kind: str) -> Result:
    """Files after each stage of the recipe, alone and after the one before."""
    model, task, steps = _setting(kind)
    prune, share = steps[:-2], steps[-2:]
    pruned = paredown.apply(model, prune, task)
    made = {
        "float32": model,
        "shared": paredown.apply(model, share, task),
        "pruned": pruned,
        "pruned, shared": paredown.apply(pruned, share, task),
    }
    result = _result(f"sharing: {kind} on digits, stage by stage", made, task)
    last = result.rows[-1]
    smaller, interval = last["times"], last["difference"]
    result.bars = [
        Bar(f"at least {SMALLER} times smaller packed", smaller >= SMALLER, True, f"{smaller:.1f}"),
        Bar(
            "no loss of accuracy: the paired interval holds 0",
            interval[1] <= 0 <= interval[2],
            True,
            _interval(last),
        ),
    ]
    tables.show(result, COLUMNS)
    return result


def _variants(kind: str) -> Result:
    """What other codebooks and hashing come to; each behind the same pruning, hashing without."""
    model, task, steps = _setting(kind)
    pruned = paredown.apply(model, steps[:-2], task)
    tune = steps[-1]
    made = {
        "16 values, untrained": ShareWeights().apply(pruned, task),
        "16 values, weighted, untrained": ShareWeights(weighted=True).apply(pruned, task),
        "4 values, untrained": ShareWeights(k=4).apply(pruned, task),
        "4 values, weighted, untrained": ShareWeights(k=4, weighted=True).apply(pruned, task),
        "4 values": paredown.apply(pruned, [ShareWeights(k=4), tune], task),
        "16 values for all layers": paredown.apply(
            pruned, [ShareWeights(scope="global"), tune], task
        ),
        "256 blocks of 4, not pruned": paredown.apply(
            model, [ShareWeights(k=256, block=4), tune], task
        ),
        "hashed to 1/8, not pruned": paredown.apply(
            model, [HashWeights(1 / 8), FineTune(epochs=20, lr=1e-3)], task
        ),
        "hashed to 1/64, not pruned": paredown.apply(
            model, [HashWeights(1 / 64), FineTune(epochs=20, lr=1e-3)], task
        ),
    }
    result = _result(f"sharing: other ways to share, {kind}", made, task, model)
    tables.show(result, COLUMNS)
    return result


def _setting(kind: str) -> tuple[Model, Task, list[Step]]:
    import lenet_digits

    task = lenet_digits.task()
    model = paredown.capture(lenet_digits.trained(getattr(lenet_digits, kind)), task.example)
    return model, task, recipe.load(tables.ROOT / "examples" / f"{NETS[kind]}.toml")


def _result(name: str, made: dict[str, Model], task: Task, first: Model | None = None) -> Result:
    whole = _row("float32", first or next(iter(made.values())), task)
    rows = [_row(kind, model, task) for kind, model in made.items()]
    for row in rows:
        found = stats.paired_difference(whole["scores"], row["scores"])
        row["difference"] = (found.estimate, found.low, found.high)
        row["times"] = whole["bytes"] / row["packed"]
    for row in rows:
        row.pop("scores")
    count = len(task.test)  # type: ignore[arg-type]
    return Result(
        name,
        f"sizes in bytes; score of the ONNX file on {count} test images, and the 95 % interval of "
        "its paired difference from float32's",
        rows,
    )


def _row(kind: str, model: Model, task: Task) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = onnxruntime.lower(model, Path(folder) / "model.onnx")
        model.save(Path(folder) / "model.safetensors")
        images, labels = task.test[:]  # type: ignore[index]
        (output,) = paredown.open(path)(images.numpy())
        return {
            "name": kind,
            "bytes": path.stat().st_size,
            "packed": packed_bytes(path),
            "saved": (Path(folder) / "model.safetensors").stat().st_size,
            "scores": (output.argmax(1) == labels.numpy()).astype(np.float64),
            "score": float((output.argmax(1) == labels.numpy()).mean()),
        }


def _interval(row: dict[str, Any]) -> str:
    middle, low, high = (100 * value for value in row["difference"])
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f}) points"


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "": lambda row: row["name"],
    "ONNX": lambda row: f"{row['bytes']:,}",
    "packed": lambda row: f"{row['packed']:,}",
    "smaller": lambda row: f"{row['times']:.1f}x",
    "model.save": lambda row: f"{row['saved']:,}",
    "score": lambda row: f"{row['score']:.2%}",
    "difference": _interval,
}
