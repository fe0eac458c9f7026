"""Scores of several files on one split, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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
    overlaps: Tensor | None = None  # (4, C) int64; see `overlaps`
    bad: dict[str, int] = field(default_factory=dict)  # output -> examples with NaN or infinity


def score_files(
    probes: dict[str, Opened], model: Model, task: Task, split: str
) -> dict[str, Scoring]:
    """Score every file on the whole split, one batch in memory at a time."""
    count = splits.size(splits.split(task, split))
    found = {name: Scoring(predictions=[] if count <= MAX_PREDICTIONS else None) for name in probes}
    for batch, outputs in ran(probes, model, task, split, f"scoring {split}"):
        for name, each in outputs.items():
            _add(found[name], each, model, task, batch)
    _check_finite(found, probes, count, split)
    return found


def ran(
    probes: dict[str, Opened], model: Model, task: Task, split: str, doing: str
) -> Iterator[tuple[Batch, dict[str, list[Tensor]]]]:
    """Each batch of a split with what every file makes of it."""
    given = feed.every(model, splits.split(task, split), feed.size(model, task.batch_size))
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        read, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        for batch in track(given, doing):
            leaves = inputs.leaves(model, batch.inputs, inputs.of_split(split))
            write_batches(read, [inputs.arrays(model, leaves)])
            found = {}
            for name, probe in probes.items():
                [arrays] = probe.run(read, made)
                found[name] = batch.cut([torch.from_numpy(array) for array in arrays])
            yield batch, found


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
    counted = overlaps(first, batch.target, task)
    if counted is not None:
        found.overlaps = counted if found.overlaps is None else found.overlaps + counted
    if found.predictions is not None:
        classes = first.dim() == 2 and first.shape[1] > 1 and first.is_floating_point()
        if classes:
            found.predictions += first.argmax(1).tolist()
        else:
            found.predictions = None


def overlaps(output: Tensor, target: object, task: Task) -> Tensor | None:
    """Of a class for each place, as in segmentation, (4, C) int64: the places where class and
    target agree on each class, those of the prediction, those of the target, and the examples that
    have the class; what is ignored counts nowhere. None for other outputs.

    Args:
        output: (B, C, H, W) floats, the class with the largest one being the prediction; or with
            one or three dimensions in place of two.
        target: (B, H, W) whole numbers.

    Example:
        >>> scores = torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]])  # classes 0 and 1
        >>> task = Task((torch.zeros(1, 1, 1, 2),), score=None)
        >>> overlaps(scores, torch.tensor([[[0, 0]]]), task).tolist()
        [[1, 0], [1, 1], [2, 0], [1, 0]]
    """
    if not isinstance(target, Tensor) or target.is_floating_point() or target.is_complex():
        return None
    if output.dim() < 4 or output.shape[1] < 2 or not output.is_floating_point():
        return None
    if target.shape != (len(output), *output.shape[2:]):
        return None
    count, predicted = output.shape[1], output.argmax(1)
    counts = (target >= 0) & (target < count)
    for label in splits.ignored(task) or ():
        counts &= target != label
    wanted, given = target[counts].long(), predicted[counts]
    places = [wanted[wanted == given], given, wanted]
    rows = [torch.bincount(each, minlength=count) for each in places]
    images = [torch.unique(t[c]).long() for t, c in zip(target, counts, strict=True)]
    seen = torch.cat(images) if images else wanted[:0]
    return torch.stack([*rows, torch.bincount(seen, minlength=count)])


def _bad_examples(output: Tensor, length: int) -> int:
    if not (output.is_floating_point() or output.is_complex()):
        return 0
    finite = torch.isfinite(output)
    if output.dim() and len(output) == length:
        return int((~finite.reshape(length, -1).all(1)).sum())
    return 0 if bool(finite.all()) else length
