"""How one split is read: by its name in what goes wrong, and once where it fits the memory.

Every example is what the dataset's own ``__getitem__`` gives, by random numbers seeded for it. An
example that drew none of them is the same at every seed, and one that drew some is at its own: so
they are kept, a quarter of the free memory of them at most, and are not decoded again. Training,
whose epochs must stay different where data draw from generators of their own, takes kept examples
once it has seen all of them a second time and each was as before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    Dataset,
    IterableDataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from paredown.core.errors import UserError
from paredown.graph import machine

COPIED = (Tensor, np.ndarray, np.generic, int, float, str, bytes)
KEPT = 0.25  # of the free memory, for the examples of one split


class Split(Dataset[Any]):
    """A dataset under the name of its split, its inputs as a model takes them.

    Args:
        data: what the user gave.
        name: of the split, for what is said of it.
        preprocess: what makes of an example's inputs those of the model; None where they are.
        workers: processes that read it; 0 is this one.
    """

    def __init__(
        self,
        data: Dataset[Any],
        name: str,
        preprocess: Callable[[Any], Any] | None = None,
        workers: int = 0,
    ) -> None:
        self.data, self.name, self.preprocess, self.workers = data, name, preprocess, workers
        self._keeps = tensors(data) is None
        self._kept: dict[int, _Kept] = {}
        self._agreed: set[int] = set()

    def __len__(self) -> int:
        return size(self)

    def __getitem__(self, index: int) -> Any:
        """As it comes, by whatever numbers are drawn."""
        return self._ready(self.data[index], index)

    def raw(self, index: int) -> Any:
        """An example's inputs as the user's data give them, before any preprocessing."""
        with machine.same_numbers():
            return pair(examples(self.data, [index], 0)[0], self.name)[0]

    def read(
        self, indices: Sequence[int], seed: int, places: Sequence[int], again: bool = False
    ) -> list[Any]:
        """The examples, each by what is drawn at its place.

        Args:
            again: read them, whatever is kept.

        Raises:
            UserError: one cannot be read; names it.
        """
        if not (self._keeps and one_by_one(self.data)):
            return self._fresh(indices, seed, places)
        found = []
        for index, place in zip(indices, places, strict=True):
            row = None if again else self.kept(index, seed, place)
            if row is None:
                [row] = self._fresh([index], seed, [place])
                if not again:
                    self.keep(index, row, seed, place, machine.drawn(seed_of(seed, place)))
            found.append(row)
        return found

    def kept(self, index: int, seed: int, place: int) -> Any:
        """The example where it was read before and would be the same; None where not."""
        entry = self._kept.get(index)
        if entry is None:
            return None
        sure = not entry.drew and len(self._agreed) == len(self)
        return entry.row if sure or (entry.seed, entry.place) == (seed, place) else None

    def keep(self, index: int, row: Any, seed: int, place: int, drew: bool) -> None:
        """Remember an example that was read."""
        if not self._keeps:
            return
        entry = self._kept.get(index)
        if entry is None:
            if not self._kept and _bytes(row) * len(self) > KEPT * machine.free_bytes():
                self._keeps = False
                return
            copied = _copied(row)
            self._keeps = copied is not None
            if copied is not None:
                self._kept[index] = _Kept(copied, seed, place, drew)
        elif not (entry.drew or drew):
            if _equal(entry.row, row):
                self._agreed.add(index)
            else:  # it draws from a generator of its own
                self._keeps = False
                self._kept.clear()

    def _fresh(self, indices: Sequence[int], seed: int, places: Sequence[int]) -> list[Any]:
        alone = len(indices) == 1
        which = f"example {indices[0]}" if alone else f"one of the examples {list(indices)[:8]}"
        with _told(self.name, which, "cannot be read"):
            rows = examples(self.data, indices, seed, places)
        return [self._ready(row, index) for row, index in zip(rows, indices, strict=True)]

    def _ready(self, row: Any, index: int) -> Any:
        if self.preprocess is None:
            return row
        inputs, target = pair(row, self.name)
        with _told(self.name, f"example {index}", "task.preprocess failed on it"):
            made = self.preprocess(inputs)
        return (made,) if target is None else (made, target)


class _Kept:
    """An example as it was read: by which seed, at which place, and whether it drew numbers."""

    def __init__(self, row: Any, seed: int, place: int, drew: bool) -> None:
        self.row, self.seed, self.place, self.drew = row, seed, place, drew


@contextlib.contextmanager
def _told(name: str, which: str, what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except SystemExit as end:  # it is told wherever it is read
        said = f"its code ended the program (sys.exit, with {end.code!r}); raise an error instead"
        raise UserError(f"{name}: {which}: {said}.") from end
    except Exception as error:
        raise UserError(f"{name}: {which}: {what}: {type(error).__name__}: {error}") from error


def _copied(row: Any) -> Any:
    """An example of its own memory, as some data give the same tensor filled anew; None where it
    holds something whose copy is not known."""
    leaves, spec = pytree.tree_flatten(row)
    if not all(isinstance(leaf, COPIED) for leaf in leaves):
        return None
    made = [leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf) for leaf in leaves]
    return pytree.tree_unflatten(made, spec)


def _bytes(row: Any) -> int:
    return sum(getattr(leaf, "nbytes", 64) for leaf in pytree.tree_leaves(row)) + 256


def _equal(one: Any, other: Any) -> bool:
    """Whether two examples have the same bits; NaN is NaN."""
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=False)
    return all(_same(a, b) for a, b in pairs)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and same(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other) or (np.shape(one) == np.shape(other) and _nans(one))
    return bool(one == other) or (one != one and other != other)


def _nans(values: Any) -> bool:
    return np.asarray(values).dtype.kind == "f" and bool(np.isnan(values).any())


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits; NaN is NaN."""
    if torch.equal(one, other):
        return True
    floats = one.shape == other.shape and one.is_floating_point()
    return floats and torch.equal(one.nan_to_num(), other.nan_to_num())


# --- what a dataset is -----------------------------------------------------------------------


def named(data: Any) -> str:
    """What the split is called that a dataset is, or is a part of.

    Example:
        >>> named(Subset(Split(TensorDataset(torch.zeros(3)), "train"), [0])), named([])
        ('train', 'task')
    """
    while isinstance(data, Subset):
        data = data.dataset
    return data.name if isinstance(data, Split) else "task"


def size(data: Any) -> int:
    """How many examples it has.

    Raises:
        UserError: it has no length or no index.
    """
    inner: Any = data.data if isinstance(data, Split) else data
    kind, asks = type(inner), "expected a dataset with a length and an index, as TensorDataset has"
    if isinstance(inner, IterableDataset) or not hasattr(kind, "__getitem__"):
        instead = ""
        if isinstance(inner, IterableDataset):
            instead = ", which has no index; read it into a list"
        elif isinstance(getattr(inner, "dataset", None), Dataset):
            instead = "; give its .dataset, paredown makes the batches"
        raise UserError(f"{named(data)}: {asks}, got a {kind.__name__}{instead}.")
    try:
        return len(inner)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{named(data)}: {asks}; its length fails: {error}.") from error


def tensors(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors whose rows a dataset's examples are, where nothing of the user's is done to
    them; None for any other."""
    if isinstance(data, Split):
        return tensors(data.data) if data.preprocess is None else None
    methods = ("__getitem__", "__len__")
    plain = isinstance(data, TensorDataset) and all(
        getattr(type(data), name) is getattr(TensorDataset, name) for name in methods
    )
    return data.tensors if plain else None


def derived(data: Any) -> bool:
    """Whether its targets are what the model itself says of its inputs.

    Example:
        >>> derived(TensorDataset(torch.zeros(3)))
        False
    """
    while isinstance(data, (Split, Subset)):
        data = data.data if isinstance(data, Split) else data.dataset
    return bool(getattr(data, "derived", False))


def one_by_one(data: Any) -> bool:
    """Whether its examples do not depend on those that are read with them."""
    if isinstance(data, Subset) and type(data).__getitems__ is Subset.__getitems__:  # type: ignore[attr-defined]
        return one_by_one(data.dataset)
    item, items = (_depth(type(data), name) for name in ("__getitem__", "__getitems__"))
    stacked = getattr(type(data), "__getitems__", None) is StackDataset.__getitems__  # type: ignore[attr-defined]
    return items is None or (item is not None and item < items) or stacked


def _depth(kind: type, name: str) -> int | None:
    """How far up a class inherits a method from; None where it has none."""
    found = (depth for depth, each in enumerate(kind.__mro__) if name in vars(each))
    return next(found, None)


def pair(item: Any, name: str = "task") -> tuple[Any, Any]:
    """Inputs and target of an example, or of a batch; None where there is no target.

    Raises:
        UserError: it is no such pair.
    """
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        return item[0], item[1] if len(item) == 2 else None
    raise UserError(
        f"{name}: a split must give (inputs, target) pairs, inputs being a tensor, a tuple or a "
        f"dict; it gives {_describe(item)}."
    )


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {len(item)}"
    return f"a {type(item).__name__}"


# --- examples --------------------------------------------------------------------------------


def seed_of(seed: int, place: int) -> int:
    """By what an example's numbers are drawn."""
    return (seed * 2_654_435_761 + place * 40_503) % 2**32


def _one(data: Any, index: int, place: int, seed: int) -> Any:
    """An example of a dataset, by what is drawn for its place in the split."""
    machine.seed_reading(seed_of(seed, place))
    return data[index]


def examples(
    data: Any,
    indices: Sequence[int],
    seed: int,
    places: Sequence[int] | None = None,
    again: bool = False,
) -> list[Any]:
    """Examples as the dataset's own ``__getitem__`` gives them, or its ``__getitems__``, whichever
    is the more derived: torch takes one that a subclass inherits, which passes by what it changed.
    """
    places = indices if places is None else places
    if isinstance(data, Split):
        return data.read(indices, seed, places, again)
    kind = type(data)
    item, items = (_depth(kind, name) for name in ("__getitem__", "__getitems__"))
    if items is None or (item is not None and item < items):
        pairs = zip(indices, places, strict=True)
        return [_one(data, index, place, seed) for index, place in pairs]
    if kind.__getitems__ is Subset.__getitems__:  # it asks what it holds as torch does
        inner = [data.indices[n] for n in indices]
        return examples(data.dataset, inner, seed, places, again)
    if kind.__getitems__ is StackDataset.__getitems__:  # likewise
        pairs = zip(indices, places, strict=True)
        return [_one(data, index, place, seed) for index, place in pairs]
    machine.seed_reading(seed_of(seed, places[0]))
    return list(data.__getitems__(list(indices)))


def collated(rows: list[Any], name: str, indices: Sequence[int]) -> Any:
    """A batch of examples.

    Raises:
        UserError: they have no common shape, or hold something else than numbers; names one.
    """
    try:
        return default_collate(rows)
    except Exception as error:
        shapes = [_shapes(row) for row in rows]
        other = next((n for n, each in enumerate(shapes) if each != shapes[0]), None)
        if other is None:
            raise UserError(f"{name}: its examples make no batch: {error}") from error
        raise UserError(
            f"{name}: example {indices[other]} is {_words(shapes[other])}, and example "
            f"{indices[0]} {_words(shapes[0])}; a batch needs one shape: pad or cut them, or set "
            "batch_size=1."
        ) from error


def _shapes(row: Any) -> list[str]:
    """Dtype and shape, or type, of all that an example holds."""
    return [
        f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        if isinstance(leaf, (Tensor, np.ndarray))
        else type(leaf).__name__
        for leaf in pytree.tree_leaves(row)
    ]


def _words(shapes: list[str]) -> str:
    return " with ".join(shapes) or "empty"
