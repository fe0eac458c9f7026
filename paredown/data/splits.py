"""Batches of a split, their fingerprint, and what is wrong with them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, Subset

from paredown.core.errors import UserError
from paredown.core.task import SPLITS, Task
from paredown.data import loader, reading
from paredown.data.reading import Split
from paredown.graph import machine, structure

CALIBRATION_EXAMPLES = 512


def split(task: Task, name: str) -> Dataset[Any]:
    """A split of the task; calibration falls back to the start of the training data.

    Raises:
        UserError: the task has no such split, or it is empty.
    """
    data: Any = getattr(task, name)
    if data is None and name == "calibration" and task.train is not None:
        data = Subset(task.train, range(min(CALIBRATION_EXAMPLES, size(task.train))))
    if data is None:
        raise UserError(f"task: has no {name} split, which is needed here.")
    if size(data) == 0:
        raise UserError(f"task: its {name} split is empty.")
    return data  # type: ignore[no-any-return]


def ignored(task: Task) -> tuple[int, ...] | None:
    """The labels that the task says do not count; None where it says nothing."""
    return (task.ignore,) if isinstance(task.ignore, int) else task.ignore


def prepared(task: Task) -> Task:
    """The task with every split under its name, its ``preprocess`` being run as it is read; for as
    long as this lives, examples that fit the memory are read once. Idempotent.
    """
    given = {name: getattr(task, name) for name in SPLITS}
    named: dict[str, Any] = {
        name: Split(data, name, task.preprocess, task.workers)
        for name, data in given.items()
        if data is not None and not isinstance(data, Split)
    }
    return replace(task, **named, preprocess=None)


def size(data: Dataset[Any]) -> int:
    return reading.size(data)


def batches(
    data: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    most: int | None = None,
    again: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """``(inputs, target)`` batches; target is None where the data has no labels.

    The order of a shuffled pass depends on ``seed`` alone, and so do the numbers that the dataset
    draws for an example from torch, numpy and Python; the caller's are left alone.

    Args:
        most: batches, at most.
        again: read every example, whatever was kept of it.

    Raises:
        UserError: an example cannot be read, or some have no common shape; names it.

    Example:
        >>> x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
        >>> [target.tolist() for _, target in batches(torch.utils.data.TensorDataset(x, y), 2)]
        [[0, 1], [2]]
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = reading.tensors(data)
    if tensors is not None:
        found = _tensor_batches(tensors, batch_size, shuffle, generator)
        for item in itertools.islice(found, most):
            yield reading.pair(item, reading.named(data))
        return
    count = size(data)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # as torch's loader does
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    chosen = [each.tolist() for each in order.split(batch_size)[:most]]
    for item in loader.batches(data, chosen, seed, again):
        inputs, target = reading.pair(item, reading.named(data))
        _check_numbers(data, inputs)
        yield inputs, target


def _check_numbers(data: Dataset[Any], inputs: Any) -> None:
    """Refuse inputs that hold text or other things than tensors of numbers."""
    leaves, form = structure.flatten(inputs)
    other = structure.opaque(form).values()
    if not leaves or other:
        kind = next(iter(other), "text" if "str" in str(_kinds(inputs)) else "no tensor")
        raise UserError(
            f"{reading.named(data)}: expected inputs of numbers, got {kind}; make tensors of them "
            "in the dataset, or in Task(preprocess=)."
        )


def _kinds(value: Any) -> set[str]:
    return {type(leaf).__name__ for leaf in pytree.tree_leaves(value)}


def example(data: Dataset[Any], index: int) -> Any:
    """One example, as `batches` reads it."""
    with machine.same_numbers():
        return reading.examples(data, [index], 0)[0]


def _tensor_batches(
    tensors: tuple[Tensor, ...], batch_size: int, shuffle: bool, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    count = len(tensors[0])
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    for chosen in order.split(batch_size):
        yield [tensor[chosen] for tensor in tensors]


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``inputs``: ``(args, kwargs)``."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def fingerprint(data: Dataset[Any], batch_size: int = 256) -> str:
    """SHA-256 over the split's tensors: another run can tell whether it saw the same data.

    Targets that the model itself gives follow from the rest, and are other in their last bits where
    sums are added in another order: they are left out.
    """
    digest, derived = hashlib.sha256(), reading.derived(data)
    for inputs, target in batches(data, batch_size):
        for tensor in structure.flatten((inputs, None if derived else target))[0]:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unrepeated(data: Dataset[Any], batch_size: int) -> int | None:
    """The first example that is another one when it is read again; None where there is none."""
    if reading.tensors(data) is not None:
        return None
    start = 0
    twice = (batches(data, batch_size, again=True) for _ in range(2))
    for pair_ in zip(*twice, strict=True):
        once, again = (structure.flatten(item)[0] for item in pair_)
        for place in range(len(once[0]) if once else 0):
            pairs = zip((t[place] for t in once), (t[place] for t in again), strict=True)
            if not all(reading.same(*each) for each in pairs):
                return start + place
        start += len(once[0]) if once else 0
    return None


@dataclass
class Survey:
    """What all of a split holds.

    Attributes:
        bad: examples with NaN or infinite inputs.
        ends: of each tensor of whole numbers, its least and its largest number and in which
            example each stands: ``(number, example)`` by what it is, such as ("label", "largest").
    """

    bad: int = 0
    ends: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def add(self, inputs: Any, target: Any, start: int) -> None:
        """One batch more, whose first example is that one of the split."""
        leaves = structure.flatten(inputs)[0]
        finite = [torch.isfinite(t).reshape(len(t), -1).all(1) for t in leaves if _floats(t)]
        self.bad += int((~torch.stack(finite).all(0)).sum()) if finite else 0
        for name, tensors in (("input", leaves), ("label", structure.flatten(target)[0])):
            for place, tensor in enumerate(tensors):
                if tensor.numel() and tensor.dim() and not _floats(tensor):
                    self._ends(f"{name} {place}", tensor.reshape(len(tensor), -1), start)

    def _ends(self, name: str, tensor: Tensor, start: int) -> None:
        rows = tensor.cpu().numpy()  # torch has no least of booleans and of wide unsigned numbers
        for which, best in (("least", rows.min(1).argmin()), ("largest", rows.max(1).argmax())):
            row = rows[best]
            number, example = int(row.min() if which == "least" else row.max()), start + int(best)
            now = self.ends.get((name, which))
            beyond = now is None or (number < now[0] if which == "least" else number > now[0])
            if beyond:
                self.ends[name, which] = number, example


def _floats(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def survey(task: Task, name: str) -> Survey:
    """What all of a split holds, in one reading of it.

    Raises:
        UserError: it is empty, or an example cannot be read.
    """
    data, found, start = split(task, name), Survey(), 0
    for inputs, target in batches(data, task.batch_size):
        found.add(inputs, target, start)
        start += len(structure.flatten(inputs)[0][0])
    return found


def problems(task: Task, surveys: dict[str, Survey]) -> list[str]:
    """Everything wrong with the splits: empty, one example, NaN or infinite inputs.

    Args:
        surveys: of the splits that could be read, where they are put.
    """
    found = []
    for name in SPLITS:
        data = getattr(task, name)
        if data is None:
            continue
        try:
            count = size(data)
            if count < 2:
                few = f"task: its {name} split has {count} examples; at least 2 are needed."
                found.append(few)
                continue
            surveys[name] = survey(task, name)
        except UserError as error:
            found.append(str(error))
            continue
        bad = surveys[name].bad
        if bad:
            found.append(f"task: {bad} of {count} examples of {name} hold NaN or infinite inputs.")
    return found
