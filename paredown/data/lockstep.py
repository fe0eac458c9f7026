"""Versions of a model run side by side, batch by batch, a node at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import splits
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of

BATCHES = 32  # that the examples are run in, unless the model's batch is fixed
MEMORY = 1 << 30  # bytes of values between layers that the models together may hold at a time


class Lane(fx.Interpreter):
    """One batch on its way through a graph, a node at a time."""

    def __init__(self, graph: fx.GraphModule, values: Sequence[Tensor]):
        super().__init__(graph)
        inputs = [value.clone() for value in values]  # an op may write into them
        self.args_iter = iter(self.graph.process_inputs(*inputs))

    def step(self, node: fx.Node, seed: int) -> Any:
        """Run the node; what it draws at random is the same in both models."""
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            torch.manual_seed(seed)  # for each op it would take longer than the op
        self.env[node] = self.run_node(node)
        return self.env[node]

    def forget(self, node: fx.Node) -> None:
        """Free what ``node`` was the last to use."""
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]

    def held_bytes(self) -> int:
        """Of the values in memory, parameters aside."""
        values = [value for node, value in self.env.items() if node.op != "get_attr"]
        return sum(t.nbytes for v in values for t in _tensors(v))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def run(lanes: list[Lane], node: fx.Node) -> list[Any]:
    """Run one node in every batch; its values. A weight is rounded once for all of them."""
    if form_of(node) is not None and lanes:
        rounded = lanes[0].step(node, 0)
        for lane in lanes:
            lane.env[node] = rounded
        return [rounded] * len(lanes)
    return [lane.step(node, seed) for seed, lane in enumerate(lanes)]


def advance(lanes: list[Lane], ahead: Iterator[fx.Node], name: str) -> list[Any]:
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
    model = models[0]
    split = splits.split(task, "calibration")
    size, smallest = splits.size(split), model.fixed_batch or 1
    if size < smallest:
        raise UserError(
            f"calibration: {size} examples do not fill the model's batch of {smallest}."
        )
    fitting = int((memory or MEMORY) / example_bytes(models))
    count = max(smallest, min(examples, size, size if memory else fitting))
    batch = min(task.batch_size, count // least, fitting if memory else count)
    batch = model.fixed_batch or max(1, batch)
    return _bound(model, split, batch, count // batch)


def example_bytes(models: Sequence[Model]) -> float:
    """The most bytes that one example's values take in these models together."""
    each = [item.example for item in models[0].inputs]
    peak = sum(peak_bytes(model, each) for model in models)
    return max(1.0, peak / max(len(leaf) for leaf in each))


def _bound(model: Model, split: Any, batch: int, count: int) -> list[list[Tensor]]:
    found = itertools.islice(splits.batches(split, batch, shuffle=True), count)
    return [model.bind(*splits.arguments(inputs)) for inputs, _ in found]


def peak_bytes(model: Model, values: Sequence[Tensor]) -> int:
    """The most bytes that one batch's values take, views counted as copies."""
    lane, most = Lane(model.graph, values), 0
    for node in model.graph.graph.nodes:
        lane.step(node, 0)
        most = max(most, lane.held_bytes())
        lane.forget(node)
    return most
