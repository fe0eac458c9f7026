"""Versions of a model run side by side, batch by batch, a node at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.interpret import Pass
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of

BATCHES = 32  # that the examples are run in, unless the model's batch is fixed
MEMORY = 1 << 30  # bytes of values between layers that the models together may hold at a time


def start(model: Model, batch: Sequence[Tensor]) -> Pass:
    """One batch at the start of its way through the model's graph."""
    return Pass(model.graph).start(batch)


def step(lane: Pass, node: fx.Node, seed: int) -> Any:
    """Run the node; what it draws at random is the same in all models."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        torch.manual_seed(seed)  # for each op it would take longer than the op
    return lane.step(node)


def run(lanes: list[Pass], node: fx.Node) -> list[Any]:
    """Run one node in every batch; its values. A weight is rounded once for all of them."""
    if form_of(node) is not None and lanes:
        rounded = step(lanes[0], node, 0)
        for lane in lanes:
            lane.env[node] = rounded
        return [rounded] * len(lanes)
    return [step(lane, node, seed) for seed, lane in enumerate(lanes)]


def advance(lanes: list[Pass], ahead: Iterator[fx.Node], name: str) -> list[Any]:
    """Run up to the node of that name; its value in each batch."""
    for node in ahead:
        values = run(lanes, node)
        for lane in lanes:
            lane.forget(node)
        if node.name == name:
            return values
    raise AssertionError(f"{name} comes too early")


def batches(
    models: Sequence[Model],
    task: Task,
    examples: int,
    memory: int | None = None,
    least: int = BATCHES,
) -> list[list[Tensor]]:
    """The inputs of random batches of the calibration split, for versions of a model.

    Args:
        models: versions that run side by side.
        examples: in all, at most.
        memory: bytes of values that a batch of each may hold, where batches run one by one; None
            for batches that run side by side and hold `MEMORY` together.
        least: how many batches there are, unless the model's batch is fixed or memory holds fewer.
    """
    model, data = models[0], splits.split(task, "calibration")
    feed.check_fills(model, data, "calibration")
    size, smallest = splits.size(data), feed.size(model, 1)
    fitting = int((memory or MEMORY) / feed.example_bytes(models))
    count = max(smallest, min(examples, size, size if memory else fitting))
    batch = feed.size(model, task.batch_size, count // least, fitting if memory else count)
    given = feed.whole(model, data, "calibration", batch, count // batch, shuffle=True)
    return [batch.inputs for batch in given.bound()]
