"""Scores of several files on one split, side by side."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.progress import track
from paredown.core.task import Task
from paredown.data import splits
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


# Scores


def score_files(
    probes: dict[str, Opened], model: Model, task: Task, split: str
) -> dict[str, Scoring]:
    """Score every file on the whole split, one batch in memory at a time."""
    examples = splits.split(task, split)
    count, fixed = splits.size(examples), model.fixed_batch
    size = fixed or task.batch_size
    found = {name: Scoring(predictions=[] if count <= MAX_PREDICTIONS else None) for name in probes}
    total = -(-count // size)
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        for batch, target in track(splits.batches(examples, size), f"scoring {split}", total):
            length = len(structure.flatten(batch)[0][0])
            leaves = inputs.leaves(model, batch, f"task: its {split} split", fixed)
            write_batches(given, [inputs.arrays(model, leaves)])
            for name, probe in probes.items():
                [arrays] = probe.run(given, made)
                outputs = [
                    _cut(torch.from_numpy(array), len(leaves[0]), length) for array in arrays
                ]
                _add(found[name], outputs, model, task, target, length)
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


def _cut(output: Tensor, padded: int, length: int) -> Tensor:
    """The output without what padding added to its batch."""
    return output[:length] if output.dim() and len(output) == padded else output


def _add(
    found: Scoring, outputs: list[Tensor], model: Model, task: Task, target: Any, length: int
) -> None:
    """Score one batch; batches with bad outputs are counted only."""
    names = structure.names(model.outputs)
    bad = {
        name or "output": rows
        for name, output in zip(names, outputs, strict=True)
        if (rows := _bad_examples(output, length))
    }
    for name, rows in bad.items():
        found.bad[name] = found.bad.get(name, 0) + rows
    if bad:
        return
    with torch.no_grad():
        found.scores.append(
            _checked(task, structure.unflatten(outputs, model.outputs), target, length)
        )
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


def _checked(task: Task, output: Any, target: Any, length: int) -> Tensor:
    """The scores of a batch (B,), float64.

    Raises:
        UserError: `task.score` failed or did not give one finite number per example.
    """
    try:
        scores = torch.as_tensor(task.score(output, target))
    except Exception as error:
        raise UserError(f"score: failed on a batch: {type(error).__name__}: {error}") from error
    if scores.shape != (length,) or scores.is_complex():
        raise UserError(
            f"score: expected one number per example, shape ({length},), got {scores.dtype} of "
            f"shape {tuple(scores.shape)}; return for example (output.argmax(1) == target).float()."
        )
    scores = scores.detach().cpu().to(torch.float64)
    if not bool(torch.isfinite(scores).all()):
        bad = int((~torch.isfinite(scores)).sum())
        raise UserError(f"score: {bad} of {length} numbers of a batch are NaN or infinite.")
    return scores
