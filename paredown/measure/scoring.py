"""Scores of several files on one split, side by side."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.progress import track
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.data.evaluate import scored
from paredown.data.feed import Batch
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.measure import inputs
from paredown.targets.devices.device import Opened, write_batches

MAX_PREDICTIONS = 20_000


@dataclass
class Scoring:
    """What was scored of one file so far."""

    scores: list[Tensor] = field(default_factory=list)  # (B,) each
    predictions: list[int] | None = None
    bad: dict[str, int] = field(default_factory=dict)  # output -> examples with NaN or infinity


def score_files(
    probes: dict[str, Opened], model: Model, task: Task, split: str
) -> dict[str, Scoring]:
    """Score every file on the whole split, one batch in memory at a time."""
    examples = splits.split(task, split)
    count = splits.size(examples)
    found = {name: Scoring(predictions=[] if count <= MAX_PREDICTIONS else None) for name in probes}
    given = feed.every(model, examples, feed.size(model, task.batch_size))
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        read, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        for batch in track(given, f"scoring {split}"):
            leaves = inputs.leaves(model, batch.inputs, inputs.of_split(split))
            write_batches(read, [inputs.arrays(model, leaves)])
            for name, probe in probes.items():
                [arrays] = probe.run(read, made)
                outputs = batch.cut([torch.from_numpy(array) for array in arrays])
                _add(found[name], outputs, model, task, batch)
    _check_finite(found, probes, count, split)
    return found


def _check_finite(
    found: dict[str, Scoring], probes: dict[str, Opened], count: int, split: str
) -> None:
    for name, probe in probes.items():
        for output, bad in found[name].bad.items():
            raise UserError(
                f"{probe.file}: output {output!r} holds NaN or infinite values for {bad} of "
                f"{count} examples of {split}."
            )


def _add(found: Scoring, outputs: list[Tensor], model: Model, task: Task, batch: Batch) -> None:
    """Score one batch; batches with bad outputs are counted only."""
    names = structure.names(model.outputs)
    bad = {
        name or "output": rows
        for name, output in zip(names, outputs, strict=True)
        if (rows := _bad_examples(output, batch.count))
    }
    for name, rows in bad.items():
        found.bad[name] = found.bad.get(name, 0) + rows
    if bad:
        return
    with torch.no_grad():
        output = structure.unflatten(outputs, model.outputs)
        found.scores.append(scored(task, output, batch.target, batch.count))
    first = outputs[0]
    if found.predictions is not None:
        classes = first.dim() == 2 and first.shape[1] > 1 and first.is_floating_point()
        if classes:
            found.predictions += first.argmax(1).tolist()
        else:
            found.predictions = None


def _bad_examples(output: Tensor, length: int) -> int:
    if not (output.is_floating_point() or output.is_complex()):
        return 0
    finite = torch.isfinite(output)
    if output.dim() and len(output) == length:
        return int((~finite.reshape(length, -1).all(1)).sum())
    return 0 if bool(finite.all()) else length
