"""The score of each example of a split."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, feed
from paredown.graph import machine, structure
from paredown.graph.model import Model


def evaluate(model: Model, split: Dataset[Any], task: Task) -> Tensor:
    """The score of each example of a split, (N,) float32 on the CPU; evaluation mode.

    Raises:
        UserError: ``task.score`` does not give one finite number for each example.
    """
    model.eval()
    device, scores = machine.device_of(model), []
    with torch.no_grad():
        for batch in feed.every(model, split, feed.size(model, task.batch_size)):
            full = batch.inputs, batches.padded(batch.target, batch.size)
            scores.append(_scores(model, task, batches.to(full, device))[: batch.count])
    return torch.cat(scores)


def _scores(model: Model, task: Task, batch: Any) -> Tensor:
    count = batches.count(batch)
    output = None
    try:
        output = batches.call(model, batch[0])
    except Exception as error:
        if not machine.no_memory(error) or count == 1 or model.fixed_batch:
            raise
    if output is None:  # the handler has let go of the failed pass, and of its memory
        progress.say(f"out of memory at a batch of {count}: evaluating it in two halves")
        halves = batches.chunks(batch, -(-count // 2))
        return torch.cat([_scores(model, task, half) for half in halves])
    return scored(task, output, batch[1], count).float()


def postprocessed(task: Task, output: Any) -> Any:
    """What the task makes of a batch's output.

    Raises:
        UserError: ``task.postprocess`` fails.
    """
    assert task.postprocess is not None
    try:
        return task.postprocess(output)
    except Exception as error:
        raise UserError(f"task.postprocess failed: {type(error).__name__}: {error}") from error


def failed(what: str, error: Exception, output: Any, target: Any) -> str:
    """That a function of the user's failed, in a sentence with what it was given.

    Example:
        >>> failed("task.loss", IndexError("of 3."), torch.zeros(2, 3), torch.tensor([0, 7]))[:29]
        'task.loss failed: IndexError:'
    """
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    reason = f"{kind}{error}".split("\n")[0].rstrip(".")
    both = f"an output of {_described(output)} and a target of {_described(target)}"
    return f"{what} failed: {reason}; it was given {both}."


def _described(value: Any) -> str:
    """Dtype and shape of all tensors in it, and the ends of whole numbers."""
    leaves = structure.flatten(value)[0]
    if not leaves:
        return "None" if value is None else type(value).__name__
    told = []
    for leaf in leaves[:4]:
        whole = not leaf.is_floating_point() and not leaf.is_complex() and leaf.numel()
        ends = f" from {int(leaf.min())} to {int(leaf.max())}" if whole else ""
        told.append(f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{ends}")
    return ", ".join(told)


def _check_rows(output: Any, count: int) -> None:
    """Refuse what a postprocess made of a batch where a score would set its rows beside the wrong
    targets, or one row beside all of them; what has a row for each example, or tells by its nesting
    whose each row is, passes."""
    leaves = structure.flatten(output)[0]
    if isinstance(output, (Tensor, np.ndarray)):
        rows = len(output) if output.ndim else 1
    elif isinstance(output, (tuple, list)) and not leaves:
        rows = len(output)
    else:
        every = {len(leaf) if leaf.dim() else 1 for leaf in leaves}
        rows = 1 if every == {1} else count
    if rows != count:
        raise UserError(
            f"task.postprocess: expected a row for each of the {count} examples of a batch, got "
            f"{rows}; keep every example, in its place."
        )


def scored(task: Task, output: Any, target: Any, count: int) -> Tensor:
    """The scores of a batch of ``count`` examples, (B,) float64 on the CPU.

    Raises:
        UserError: ``task.score`` or ``task.postprocess`` fails, the latter gives another number of
            rows, or the score does not give one finite number for each example.

    Example:
        >>> task = Task((torch.zeros(1, 2),), score=lambda out, y: out.argmax(1) == y)
        >>> scored(task, torch.eye(2), torch.tensor([0, 0]), 2).tolist()
        [1.0, 0.0]
    """
    if task.postprocess is not None:
        output = postprocessed(task, output)
        _check_rows(output, count)
    try:
        given = task.score(output, target)
    except Exception as error:
        raise UserError(failed("task.score", error, output, target)) from error
    try:
        scores = torch.as_tensor(given).detach().cpu()
    except Exception:
        scores = None  # no numbers
    if scores is None or scores.shape != (count,) or scores.is_complex():
        got: Any = type(given).__name__ if scores is None else tuple(scores.shape)
        got = scores.dtype if scores is not None and scores.is_complex() else got
        raise UserError(
            f"task.score: expected one number for each example, shape ({count},), got {got}; do "
            "not average over the batch, return for example (output.argmax(1) == target).float()."
        )
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise UserError(
            f"task.score: {bad} of {count} scores of a batch are NaN or infinite; check the "
            "model's output and divisions by zero in the score."
        )
    return scores.double()
