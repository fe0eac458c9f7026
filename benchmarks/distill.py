"""What a student of about a tenth of its teacher's parameters learns alone, and from the teacher.

Digits (with all labels, and with 100) and the code model; three seeds, as many optimiser steps in
every row; scores are of the exported file in ONNX Runtime, on examples that nothing was trained or
chosen on.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import paredown
from paredown import Distill, FineTune
from paredown.core.task import Task
from paredown.graph.model import Model
from paredown.measure import stats
from paredown.steps.step import Step
from paredown.targets.runtimes import onnxruntime

sys.path.insert(0, str(tables.ROOT / "examples"))
SEEDS = 3
LABELS = 100  # of the 997 training images, where few are labelled
ALONE = "alone"
TAUGHT: dict[str, dict[str, Any]] = {
    "outputs, softened": {"loss": "softened"},
    "outputs, decoupled": {"loss": "decoupled"},
    "softened + hints": {"loss": "softened", "internal": ("hints",)},
    "softened + attention_transfer": {"loss": "softened", "internal": ("attention_transfer",)},
    "softened + similarity": {"loss": "softened", "internal": ("similarity",)},
}
BASE = "outputs, softened"
TAUGHT_CODE = {
    BASE: TAUGHT[BASE],
    "softened + hints": TAUGHT["softened + hints"],
    "softened + attention_maps": {"loss": "softened", "internal": ("attention_maps",)},
}
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "student": lambda row: row["student"],
    "score": lambda row: row["score"],
    "against alone": lambda row: row["against alone"],
    "against softened outputs": lambda row: row[f"against {BASE}"],
}


@dataclass(frozen=True)
class Case:
    """Data, models and settings of one table; ``labelled`` is what the student alone learns from,
    ``epochs`` are of ``task.train``."""

    name: str
    task: Task
    teacher: Model
    student: Callable[[], Model]
    labelled: Dataset[Any]
    epochs: float
    lr: float
    alpha: float
    temperature: float
    held: int
    taught: dict[str, dict[str, Any]]
    cache: bool  # of a language model, what the teacher says would take gigabytes


def run(quick: bool, data: str) -> list[tables.Result]:
    if data == "code_lm":
        return [_table(_code(quick))]
    return [_table(_digits(few, quick)) for few in ((True,) if quick else (True, False))]


def _digits(few: bool, quick: bool) -> Case:
    import digits

    task = replace(digits.task(), validation=None)
    images, labels = task.train.tensors  # type: ignore[union-attr]
    labelled = TensorDataset(images[:LABELS], labels[:LABELS]) if few else task.train
    name = f"digits, {LABELS} labels" if few else "digits, all 997 labels"
    return Case(
        name=name,
        task=replace(task, train=TensorDataset(images)) if few else task,
        teacher=paredown.capture(digits.model(), task.example),
        student=lambda: paredown.capture(digits.ResNet8(width=10), task.example),
        labelled=labelled,  # type: ignore[arg-type]
        epochs=12 if quick else 24,
        lr=3e-3,
        alpha=0.0 if few else 0.1,
        temperature=4.0,
        held=400,
        taught=TAUGHT,
        cache=True,
    )


def _code(quick: bool) -> Case:
    import code_lm

    task = replace(code_lm.task(), validation=None)
    if quick:
        task = replace(task, train=code_lm.Windows(code_lm.texts()["train"], 768))
    teacher = paredown.capture(code_lm.model(), task.example, task.dynamic)

    def student() -> Model:
        return paredown.capture(code_lm.CodeLM(64, 3, 4), task.example, task.dynamic)

    train: Any = task.train
    epochs = 5 if quick else 4
    taught = {BASE: TAUGHT[BASE]} if quick else TAUGHT_CODE
    return Case(
        *("code model", task, teacher, student, train, epochs),
        *(2e-3, 0.5, 1.0, 500, taught, False),
    )


def _table(case: Case) -> tables.Result:
    sizes = [sum(p.numel() for p in m.parameters()) for m in (case.teacher, case.student())]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        steps = _steps(case)
        for name in (ALONE, *case.taught):
            step, task = steps[name]
            found[name] = [_scores(case, step, task, seed, Path(folder)) for seed in range(SEEDS)]
            print(case.name, name, [f"{each.mean():.4f}" for each in found[name]], flush=True)
        whole = _measured(case.teacher, case, Path(folder))
    result = tables.Result(
        f"distillation: {case.name}; a student of {sizes[1]:,} parameters, its teacher of "
        f"{sizes[0]:,} scores {whole.mean():.2%}",
        f"{case.held} test examples through the exported file; mean of {SEEDS} seeds "
        "(lowest-highest); differences in points with their 95 % interval over the examples, each "
        "example's score being its mean over the seeds",
        [_row(name, found) for name in found],
    )
    tables.show(result, COLUMNS)
    return result


def _steps(case: Case) -> dict[str, tuple[Step, Task]]:
    """Name of a row -> how its student is trained, and on what."""
    share = len(case.task.train) / len(case.labelled)  # type: ignore[arg-type]
    alone = FineTune(epochs=case.epochs * share, lr=case.lr)
    made: dict[str, tuple[Step, Task]] = {ALONE: (alone, replace(case.task, train=case.labelled))}
    for name, settings in case.taught.items():
        how = {"alpha": case.alpha, "temperature": case.temperature, "cache": case.cache}
        how |= settings
        step = Distill(epochs=case.epochs, lr=case.lr, **how)
        made[name] = step, case.task
    return made


def _scores(case: Case, step: Any, task: Task, seed: int, folder: Path) -> np.ndarray:
    torch.manual_seed(seed)
    model = case.student()
    if isinstance(step, Distill):
        step, model = replace(step, student=model), case.teacher
    return _measured(replace(step, seed=seed).apply(model, task), case, folder)


def _measured(model: Model, case: Case, folder: Path) -> np.ndarray:
    """The score of each test example through the exported file, (N,)."""
    path = onnxruntime.lower(model, folder / "model.onnx")
    predict = onnxruntime.open(path, tables.cores())
    held = Subset(case.task.test, range(case.held))  # type: ignore[arg-type]
    scores = [
        case.task.score(torch.from_numpy(predict(inputs.numpy())[0]), target)
        for inputs, target in DataLoader(held, 50)
    ]
    return torch.cat(scores).double().numpy()


def _row(name: str, found: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    means = [100 * float(each.mean()) for each in found[name]]
    row: dict[str, Any] = {"student": name, "scores": means}
    row["score"] = f"{np.mean(means):.2f} % ({min(means):.2f}-{max(means):.2f})"
    for other in (ALONE, BASE):
        row[f"against {other}"] = "" if other == name else _difference(found[other], found[name])
    return row


def _difference(before: list[np.ndarray], after: list[np.ndarray]) -> str:
    """In points, with its interval over the examples; each is averaged over the seeds first."""
    both = [np.mean(each, axis=0) for each in (before, after)]
    found = stats.paired_difference(*both)
    shown = [f"{100 * value:+.2f}" for value in (found.estimate, found.low, found.high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"
