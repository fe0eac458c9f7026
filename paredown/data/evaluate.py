"""The score of each example of a split."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, splits
from paredown.graph import machine
from paredown.graph.model import Model


def evaluate(model: Model, split: Dataset[Any], task: Task) -> Tensor:
    """The score of each example of a split, (N,) float32 on the CPU; evaluation mode.

    Raises:
        UserError: ``task.score`` does not give one finite number for each example.
    """
    model.eval()
    device, fixed = machine.device_of(model), model.fixed_batch
    scores = []
    with torch.no_grad():
        for batch in splits.batches(split, fixed or task.batch_size):
            count = batches.count(batch)
            full = batches.padded(batch, fixed) if fixed else batch
            scores.append(_scores(model, task, batches.to(full, device))[:count])
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
    score = task.score(output, batch[1])
    if not isinstance(score, Tensor) or score.shape != (count,):
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise UserError(
            f"task.score: expected one number for each example, shape ({count},), got {got}; "
            "do not average over the batch."
        )
    found = score.detach().float().cpu()
    if not torch.isfinite(found).all():
        bad = int((~torch.isfinite(found)).sum())
        raise UserError(
            f"task.score: {bad} of {count} scores of a batch are NaN or infinite; check the "
            "model's output and divisions by zero in the score."
        )
    return found
