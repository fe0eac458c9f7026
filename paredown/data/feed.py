"""A split in batches as a model takes them: how large, how many, the last one filled up.

Everything that runs a model on a user's data asks here. A model that was captured with a fixed
batch takes no other: where every example counts (`every`), the last batch is filled up with copies
of its last example; where examples are only looked at (`whole`), what does not fill one is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.data import Dataset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, splits
from paredown.graph import machine
from paredown.graph.interpret import Pass, noting
from paredown.graph.model import Model

MEMORY = 256 << 20  # bytes that the values of one batch may take in each graph


@dataclass(frozen=True)
class Batch:
    """Some examples on their way to a model.

    Attributes:
        inputs: as the split gives them or, `Feed.bound`, the tensors in the graph's order.
        target: None where the split has no labels; never filled up.
        count: how many of the inputs' examples are no filling.
        size: with the filling.
    """

    inputs: Any
    target: Any
    count: int
    size: int

    def cut(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """A model's outputs for the inputs, without what the filling added to them.

        Example:
            >>> import torch
            >>> [found] = Batch(torch.zeros(4), None, 3, 4).cut([torch.arange(4)])
            >>> found
            tensor([0, 1, 2])
        """
        return [t[: self.count] if t.dim() and len(t) == self.size else t for t in outputs]


@dataclass(frozen=True)
class Feed:
    """The batches of a split, ``size`` examples each, for a model; as often as one likes."""

    model: Model
    data: Dataset[Any]
    size: int
    total: int  # of the batches
    shuffle: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        """The batches, inputs and targets as the split gives them, on its device."""
        found = splits.batches(
            self.data, self.size, shuffle=self.shuffle, seed=self.seed, most=self.total
        )
        for inputs, target in found:
            count = batches.count(inputs)
            if self.model.fixed_batch:
                inputs = batches.padded(inputs, self.size)
            yield Batch(inputs, target, count, batches.count(inputs))

    def bound(self) -> Iterator[Batch]:
        """The batches, inputs as the model's graph takes them, on the model's device.

        Raises:
            UserError: the inputs are not those that were captured.
        """
        device = machine.device_of(self.model)
        for batch in self:
            leaves = self.model.bind(*splits.arguments(batch.inputs))
            yield replace(batch, inputs=[leaf.to(device) for leaf in leaves])


def every(model: Model, data: Dataset[Any], size: int, most: int | None = None) -> Feed:
    """Every example of a split, or those of its first ``most`` batches.

    Example:
        >>> import paredown, torch
        >>> model = paredown.capture(torch.nn.Linear(2, 1), (torch.zeros(4, 2),))
        >>> data = torch.utils.data.TensorDataset(torch.zeros(7, 2))
        >>> [(batch.count, batch.size) for batch in every(model, data, 4)]
        [(4, 4), (3, 3)]
    """
    total = -(-splits.size(data) // size)
    return Feed(model, data, size, total if most is None else min(total, most))


def whole(
    model: Model,
    data: Dataset[Any],
    split: str,
    size: int,
    most: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> Feed:
    """The batches of a split that need no filling, at most ``most``.

    Args:
        split: what it is called.

    Raises:
        UserError: there is none, as the model takes batches of one size that are larger.
    """
    check_fills(model, data, split)
    found = every(model, data, size, most)
    total = min(found.total, splits.size(data) // size) if model.fixed_batch else found.total
    return replace(found, total=total, shuffle=shuffle, seed=seed)


def check_fills(model: Model, data: Dataset[Any], split: str) -> None:
    """Refuse a split of fewer examples than the only batch that the model takes.

    Raises:
        UserError: says how many there are, and how many are needed.
    """
    count = splits.size(data)
    if model.fixed_batch and count < model.fixed_batch:
        raise UserError(
            f"{split}: {count} examples do not fill the model's batch of {model.fixed_batch}, the "
            "only one it was captured for; give it more, or capture it for any batch."
        )


# --- how many at a time ----------------------------------------------------------------------


def size(model: Model, *most: int) -> int:
    """Examples at a time: the model's fixed batch, else the least of ``most``, at least 1."""
    allowed = [item.limits[0][1] or max(most) for item in model.inputs if 0 in item.limits]
    return model.fixed_batch or max(1, min([*most, *allowed]))


def fitting(model: Model, task: Task, memory: int) -> int:
    """Examples at a time whose values between layers take at most so many bytes."""
    if model.fixed_batch:
        return model.fixed_batch
    return size(model, task.batch_size, int(memory / example_bytes([model])))


def example_bytes(models: Sequence[Model]) -> float:
    """The most bytes that one example's values take in these models together."""
    each = [item.example for item in models[0].inputs]
    peak = sum(peak_bytes(model, each) for model in models)
    return max(1.0, peak / max(len(leaf) for leaf in each))


def peak_bytes(model: Model, leaves: Sequence[Tensor]) -> int:
    """The most bytes that one batch's values take, views counted as copies."""
    most = 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        run = Pass(model.graph).start(leaves)
        for node in model.graph.graph.nodes:
            run.step(node)
            values = [value for held, value in run.env.items() if held.op != "get_attr"]
            most = max(most, sum(t.nbytes for value in values for t in _tensors(value)))
            run.forget(node)
    return most


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


# --- to look at every value ------------------------------------------------------------------


def examples(model: Model, task: Task, split: str, most: int | None = None) -> Iterator[Batch]:
    """Bound batches of the first ``most`` examples, so small that all values of one, none of them
    freed, fit into `MEMORY`.

    All inputs together take at most about `MEMORY` too, so that they can be kept; None asks for the
    whole split, which may take more.
    """
    seen = taken = 0
    for batch in every(model, splits.split(task, split), _keeping(model, task)).bound():
        yield batch
        seen += batch.count
        taken += sum(leaf.nbytes for leaf in batch.inputs)
        if most is not None and (seen >= most or taken >= MEMORY):
            return


def _keeping(model: Model, task: Task) -> int:
    """Examples at a time so that the values of one batch fit into `MEMORY`."""
    if model.fixed_batch:
        return model.fixed_batch
    taken = 0

    def note(node: fx.Node, value: Any) -> None:
        nonlocal taken
        if node.op == "call_function" and isinstance(value, Tensor):
            taken += value.nbytes

    Pass(model.graph, noting(note)).outputs([item.example for item in model.inputs])
    given = max([len(item.example) for item in model.inputs if 0 in item.dynamic], default=1)
    return size(model, task.batch_size, MEMORY * given // max(1, taken))
