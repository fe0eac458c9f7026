"""What a task's score and loss give of the original, by which a run folder knows them again."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Subset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, evaluate, feed, reading, splits
from paredown.graph import machine
from paredown.graph.model import Model
from paredown.run.ledger import Ledger, stage_key
from paredown.train.objective import task_loss

KEY = stage_key({"yardsticks": "first batch"})
CLOSE, FEW = 1e-3, 50  # relative; and one example in so many may be on an edge


def check_yardsticks(ledger: Ledger, model: Model, task: Task) -> None:
    """Note what score and loss give of the original on the first batches; in a folder that is gone
    on with, refuse those that give something else: what was measured there would be of another.

    They are known by their numbers, so that what they call counts, and postprocessing with it; a
    function's file says nothing of that. Another preprocessing is another split.

    Raises:
        UserError: which of the two, what it gave and what it gives.
    """
    found, record = _found(model, task), ledger.done(KEY)
    if record is None:
        ledger.finish(KEY, {"stage": "", "suffix": "", **found})
        return
    for name, split in (("score", "test"), ("loss", "train")):
        place = _other(record[name], found[name])
        if place is not None:
            behind = " or task.postprocess" if name == "score" else ""
            before, now = (_told(each[name], place) for each in (record, found))
            raise UserError(
                f"{ledger.folder}: holds a run of something else, so it cannot be gone on with: "
                f"task.{name}{behind}, gave {before} of the original on the first batch of {split} "
                f"(number {place}), and gives {now}.\n"
                "Choose another --out, or delete the folder."
            )


def _found(model: Model, task: Task) -> dict[str, list[float]]:
    with machine.same_numbers(0):
        data = splits.split(task, "test")
        few = range(min(splits.size(data), feed.size(model, task.batch_size)))
        scores = evaluate.evaluate(model, Subset(data, few), task)
        return {"score": scores.double().tolist(), "loss": _loss(model, task)}


def _loss(model: Model, task: Task) -> list[float]:
    """In a list, which is empty where there is nothing to train with, or where the targets are the
    original's own outputs: then it is nothing but rounding."""
    if task.loss is None or task.train is None or reading.derived(task.train):
        return []
    data, size = splits.split(task, "train"), feed.size(model, task.batch_size)
    batch: Any = next(iter(feed.every(model, data, size, 1)))
    with torch.enable_grad():
        output = batches.call(model.copy().eval(), batch.inputs)
        loss = float(task_loss(task, output, batch.target).detach())
    return [loss] if loss == loss and abs(loss) != float("inf") else []


def _other(before: list[float], now: list[float]) -> int | None:
    """The place of the first number that is another, where more are than chance explains.

    Example:
        >>> _other([1.0, 0.5], [1.0, 0.5000001]), _other([1.0, 0.5], [1.0, 0.6])
        (None, 1)
    """
    if len(before) != len(now):
        return min(len(before), len(now))
    a, b = torch.tensor(before).double(), torch.tensor(now).double()
    far = ((a - b).abs() > CLOSE * torch.maximum(a.abs(), b.abs()) + 1e-9).nonzero().flatten()
    return int(far[0]) if len(far) > len(before) // FEW else None


def _told(numbers: list[float], place: int) -> str:
    return f"{numbers[place]:.5g}" if place < len(numbers) else "nothing"
