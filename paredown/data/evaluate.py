"""The score of each example of a split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, feed
from paredown.graph import machine
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


def scored(task: Task, output: Any, target: Any, count: int) -> Tensor:
    """The scores of a batch of ``count`` examples, (B,) float64 on the CPU.

    Raises:
        UserError: ``task.score`` or ``task.postprocess`` fails, or the score does not give one
            finite number for each example.

    Example:
        >>> task = Task((torch.zeros(1, 2),), score=lambda out, y: out.argmax(1) == y)
        >>> scored(task, torch.eye(2), torch.tensor([0, 0]), 2).tolist()
        [1.0, 0.0]
    """
    if task.postprocess is not None:
        output = postprocessed(task, output)
    try:
        given = task.score(output, target)
        scores = torch.as_tensor(given).detach().cpu()
    except Exception as error:
        raise UserError(f"task.score failed: {type(error).__name__}: {error}") from error
    if scores.shape != (count,) or scores.is_complex():
        got: Any = tuple(scores.shape) if isinstance(given, Tensor) else type(given).__name__
        got = scores.dtype if scores.is_complex() else got
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
