"""Batches of a split, their fingerprint, and what is wrong with them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from paredown.core.errors import UserError
from paredown.core.task import SPLITS, Task
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


def size(data: Dataset[Any]) -> int:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise UserError(
            "task: a split must have a length and an index, as torch's TensorDataset has."
        ) from error


def batches(
    data: Dataset[Any], batch_size: int, *, shuffle: bool = False, seed: int = 0
) -> Iterator[tuple[Any, Any]]:
    """``(inputs, target)`` batches; target is None where the data has no labels.

    The order of a shuffled pass depends on ``seed`` alone, and so do the numbers that the dataset
    draws for an example from torch, numpy and Python; the caller's are left alone. Every example is
    what the dataset's own ``__getitem__`` gives, or its ``__getitems__``, whichever is the more
    derived.

    Example:
        >>> x, y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
        >>> [target.tolist() for _, target in batches(TensorDataset(x, y), 2)]
        [[0, 1], [2]]
    """
    generator = torch.Generator().manual_seed(seed)
    if _only_indexes(data):
        yield from _tensor_batches(data.tensors, batch_size, shuffle, generator)
        return
    source = data if isinstance(data, IterableDataset) else _Read(data, seed)
    loader = DataLoader(
        source, batch_size, shuffle=shuffle, generator=generator, collate_fn=default_collate
    )
    for item in loader:
        yield pair(item)


def _only_indexes(data: Dataset[Any]) -> TypeGuard[TensorDataset]:
    """Whether its examples are rows of its tensors, with nothing of the user's done to them."""
    methods = ("__getitem__", "__len__")
    return isinstance(data, TensorDataset) and all(
        getattr(type(data), name) is getattr(TensorDataset, name) for name in methods
    )


class _Read(Dataset[Any]):
    """A split whose lists of examples are those that its own ``__getitem__`` would give: torch
    takes an inherited or delegated ``__getitems__``, which passes by what a subclass has changed.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return size(self.data)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        with machine.same_numbers():
            return _examples(self.data, indices, self.seed)


def example(data: Dataset[Any], index: int) -> Any:
    """One example, as `batches` reads it."""
    with machine.same_numbers():
        return _examples(data, [index], 0)[0]


def _one(data: Any, index: int, place: int, seed: int) -> Any:
    """An example of a dataset, by what is drawn for its place in the split."""
    machine.seed_reading((seed * 2_654_435_761 + place * 40_503) % 2**32)
    return data[index]


def _examples(
    data: Any, indices: Sequence[int], seed: int, places: Sequence[int] | None = None
) -> list[Any]:
    places = indices if places is None else places
    pairs = zip(indices, places, strict=True)
    kind = type(data)
    item, items = (_depth(kind, name) for name in ("__getitem__", "__getitems__"))
    if items is None or (item is not None and item < items):
        return [_one(data, index, place, seed) for index, place in pairs]
    if kind.__getitems__ is Subset.__getitems__:  # it asks what it holds as torch does
        return _examples(data.dataset, [data.indices[n] for n in indices], seed, places)
    if kind.__getitems__ is StackDataset.__getitems__:  # likewise
        return [_one(data, index, place, seed) for index, place in pairs]
    machine.seed_reading((seed * 2_654_435_761 + places[0] * 40_503) % 2**32)
    return list(data.__getitems__(list(indices)))


def _depth(kind: type, name: str) -> int | None:
    """How far up a class inherits a method from; None where it has none."""
    found = (depth for depth, each in enumerate(kind.__mro__) if name in vars(each))
    return next(found, None)


def _tensor_batches(
    tensors: tuple[Tensor, ...], batch_size: int, shuffle: bool, generator: torch.Generator
) -> Iterator[tuple[Any, Any]]:
    count = len(tensors[0])
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    for chosen in order.split(batch_size):
        yield pair([tensor[chosen] for tensor in tensors])


def pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        return item[0], item[1] if len(item) == 2 else None
    raise UserError(
        "task: a split must give (inputs, target) pairs, inputs being a tensor, a tuple or a "
        f"dict; it gives {_describe(item)}."
    )


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}"
    return f"a {type(item).__name__}"


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with ``inputs``: ``(args, kwargs)``."""
    if isinstance(inputs, dict):
        return (), inputs
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def fingerprint(data: Dataset[Any], batch_size: int = 256) -> str:
    """SHA-256 over the split's tensors: another run can tell whether it saw the same data."""
    digest = hashlib.sha256()
    for item in batches(data, batch_size):
        for tensor in structure.flatten(item)[0]:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unrepeated(data: Dataset[Any], batch_size: int) -> int | None:
    """The first example that is another one when it is read again; None where there is none."""
    if _only_indexes(data):
        return None
    start = 0
    for pair_ in zip(batches(data, batch_size), batches(data, batch_size), strict=True):
        once, again = (structure.flatten(item)[0] for item in pair_)
        for place in range(len(once[0]) if once else 0):
            if not all(map(_same, (t[place] for t in once), (t[place] for t in again))):
                return start + place
        start += len(once[0]) if once else 0
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN is NaN."""
    if torch.equal(one, other):
        return True
    floats = one.shape == other.shape and one.is_floating_point()
    return floats and torch.equal(one.nan_to_num(), other.nan_to_num())


def problems(task: Task) -> list[str]:
    """Everything wrong with the splits: empty, one example, NaN or infinite inputs."""
    found = []
    for name in SPLITS:
        data = getattr(task, name)
        if data is None:
            continue
        count = size(data)
        if count < 2:
            found.append(f"task: its {name} split has {count} examples; at least 2 are needed.")
            continue
        bad = _bad_examples(data, task.batch_size)
        if bad:
            found.append(f"task: {bad} of {count} examples of {name} hold NaN or infinite inputs.")
    return found


def _bad_examples(data: Dataset[Any], batch_size: int) -> int:
    bad = 0
    for inputs, _ in batches(data, batch_size):
        floats = [t for t in structure.flatten(inputs)[0] if t.is_floating_point()]
        finite = [torch.isfinite(t).reshape(len(t), -1).all(1) for t in floats]
        if finite:
            bad += int((~torch.stack(finite).all(0)).sum())
    return bad
