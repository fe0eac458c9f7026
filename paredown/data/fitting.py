"""A table's columns -> a model's inputs, by name, type and shape; nothing is guessed in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.data.files.pictures import Pictures
from paredown.data.files.table import Table
from paredown.graph.doors.opened import Wanted

CHANNELS = (1, 3, 4)
EXACT = {"float16": 2**11, "bfloat16": 2**8, "float32": 2**24, "float64": 2**53}  # whole numbers
TORCH = {"bfloat16": torch.bfloat16}  # dtypes that NumPy does not have


@dataclass(frozen=True)
class Column:
    """How one column becomes one input.

    Attributes:
        shape: of each row, as the first has it.
        order: in which its dimensions are taken; () where they stay.
        squeezed: whether each row has a batch dimension of 1, which is left out.
        added: whether a dimension of one channel is put first, or last.
    """

    name: str
    wanted: Wanted
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()
    squeezed: bool = False
    added: int | None = None

    def tensor(self, value: Any, where: str) -> Tensor:
        """One row's value as the input takes it.

        Raises:
            UserError: it has another shape than the first row, or numbers that the input's type
                does not hold.
        """
        array = np.asarray(value)
        if array.shape != self.shape:
            raise UserError(
                f"{where}: column {self.name!r} has shape {array.shape}, and the first example "
                f"{self.shape}; a batch needs one shape: pad or cut them to one."
            )
        array = array[0] if self.squeezed else array
        array = array.transpose(self.order) if self.order else array
        array = array if self.added is None else np.expand_dims(array, self.added)
        return converted(array, self.wanted.dtype, f"{where}: column {self.name!r}")


def converted(array: np.ndarray, dtype: str, where: str) -> Tensor:
    """Numbers in another type that holds them.

    Raises:
        UserError: it does not hold one of them.

    Example:
        >>> converted(np.array([0, 255], np.uint8), "float32", "x")
        tensor([  0., 255.])
    """
    kind, target = array.dtype.kind, TORCH.get(dtype)
    whole = kind in "iu" and array.size
    if (
        whole
        and dtype in EXACT
        and max(abs(int(array.max())), abs(int(array.min()))) > EXACT[dtype]
    ):
        raise UserError(f"{where} holds whole numbers that {dtype} cannot hold exactly.")
    if whole and dtype not in EXACT and dtype != "bool":
        ends = np.iinfo(dtype)
        if int(array.min()) < ends.min or int(array.max()) > ends.max:
            raise UserError(
                f"{where} holds {int(array.min())} to {int(array.max())}, which {dtype} cannot "
                "hold."
            )
    if whole and dtype == "bool" and not set(np.unique(array).tolist()) <= {0, 1}:
        raise UserError(f"{where} holds other numbers than 0 and 1, and the input takes bool.")
    made = torch.from_numpy(np.array(array, "float32" if target else dtype))
    return made.to(target) if target else made


@dataclass(frozen=True)
class Fit:
    """How a table's rows become a model's inputs.

    Attributes:
        notes: sentences on what is done to them.
    """

    table: Table
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    def inputs(self, row: int) -> dict[str, Tensor]:
        """Of one row, without a batch dimension, by the inputs' names."""
        where = f"{self.table.source}: example {row}"
        return {
            each.wanted.name: each.tensor(self.table.columns[each.name][row], where)
            for each in self.columns
        }


def fit(table: Table, wanted: Sequence[Wanted]) -> Fit:
    """Find a column for each input.

    Raises:
        UserError: an input has none, or the one it has is of another shape or type; says which,
            and what was found.

    Example:
        >>> table = Table("x.npz", {"x": np.zeros((4, 8, 8, 3), np.uint8)})
        >>> made = fit(table, [Wanted("picture", "float32", (None, 3, 8, 8))])
        >>> made.inputs(0)["picture"].shape, len(made.notes)
        (torch.Size([3, 8, 8]), 2)
    """
    names = _names(table, wanted)
    table = _with_channels(table, names)
    columns, notes = [], []
    for each, name in names:
        value = np.asarray(table.columns[name][0])
        notes += _typed(table, name, each, value)
        found = _shaped(table, name, each, value.shape)
        columns.append(found)
        notes += _told(found)
    used = {name for _, name in names} | {table.label}
    rest = [name for name in table.columns if name not in used]
    if rest:
        notes.append(f"{table.source}: {_quoted(rest)} is no input of the model and is not read")
    return Fit(table, tuple(columns), tuple(notes))


def _names(table: Table, wanted: Sequence[Wanted]) -> list[tuple[Wanted, str]]:
    """Each input with its column; the only column serves the only input under any name."""
    inputs = {each.name for each in wanted}
    free = [name for name in table.columns if name in inputs or name != table.label]
    needed = [each for each in wanted if not each.optional]
    if len(needed) == 1 and len(free) == 1 and free[0] not in inputs:
        return [(needed[0], free[0])]
    found = [(each, each.name) for each in wanted if each.name in table.columns]
    lacking = [each for each in needed if each.name not in table.columns]
    if lacking:
        has = _quoted(free) if table.named else "one column without a name"
        raise UserError(
            f"{table.source}: the model takes {', '.join(map(_input, wanted))}; the samples have "
            f"{has or 'no column besides the labels'}, and none for input {lacking[0].name!r}. "
            "Save each input under its name, as numpy.savez does with keywords."
        )
    return found


def _with_channels(table: Table, names: Sequence[tuple[Wanted, str]]) -> Table:
    """With pictures of as many channels as their input takes."""
    made = dict(table.columns)
    for each, name in names:
        column, sizes = made[name], each.shape[1:]
        if isinstance(column, Pictures) and len(sizes) == 3:
            ends = [size for size in (sizes[0], sizes[-1]) if size in CHANNELS]
            if len(ends) == 1:
                made[name] = replace(column, channels=int(ends[0]))
    return replace(table, columns=made)


def _typed(table: Table, name: str, wanted: Wanted, value: np.ndarray) -> list[str]:
    """What is done to numbers of another type.

    Raises:
        UserError: the input takes others.
    """
    kind, dtype = value.dtype.kind, wanted.dtype
    floats = dtype in EXACT
    fits = kind in "biu" or (kind == "f" and floats)
    if not fits or (kind == "b" and dtype not in ("bool", *EXACT)):
        held = "text" if kind in "US" else value.dtype.name
        raise UserError(
            f"{table.source}: input {wanted.name!r} takes {dtype}, and column {name!r} holds "
            f"{held}; save it as {dtype}."
        )
    if floats and kind in "iu":
        ends = f" {int(value.min())} to {int(value.max())} in the first example" * bool(value.size)
        return [
            f"{table.source}: column {name!r} holds whole numbers ({value.dtype.name},{ends}), "
            f"and input {wanted.name!r} gets them as they are, as {dtype}: where the model was "
            "trained on scaled values, save those"
        ]
    if kind == "f" and value.dtype.itemsize > np.dtype("float32").itemsize and dtype != "float64":
        return [f"{table.source}: column {name!r} is rounded from {value.dtype.name} to {dtype}"]
    return []


def _shaped(table: Table, name: str, wanted: Wanted, shape: tuple[int, ...]) -> Column:
    """How a row's dimensions become the input's.

    Raises:
        UserError: they do not; says what was found.
    """
    sizes, found = wanted.shape[1:], Column(name, wanted, shape)
    if _fits(shape, sizes):
        return found
    if len(shape) == len(sizes) + 1 and shape[0] == 1 and _fits(shape[1:], sizes):
        return replace(found, squeezed=True)
    if len(shape) == len(sizes) == 3:
        for order in ((2, 0, 1), (1, 2, 0)):
            channels = shape[order[0]] if order[0] == 2 else shape[order[2]]
            if channels in CHANNELS and _fits([shape[n] for n in order], sizes):
                return replace(found, order=order)
    if len(shape) == 2 and len(sizes) == 3:
        for place, made in ((0, (1, *shape)), (2, (*shape, 1))):
            if _fits(made, sizes):
                return replace(found, added=place)
    raise UserError(
        f"{table.source}: input {wanted.name!r} takes {_input(wanted)}, the batch first; column "
        f"{name!r} has {len(table):,} examples of shape {shape}."
        + _advice(table, name, shape, sizes)
    )


def _fits(shape: Sequence[int], sizes: Sequence[Any]) -> bool:
    """Whether sizes are those that are wanted, where these are fixed."""
    pairs = zip(shape, sizes, strict=False)
    return len(shape) == len(sizes) and all(
        not isinstance(size, int) or size == got for got, size in pairs
    )


def _advice(
    table: Table, name: str, shape: tuple[int, ...], sizes: Sequence[int | str | None]
) -> str:
    pictures = isinstance(table.columns[name], Pictures) or len(shape) == len(sizes) == 3
    if pictures:
        fixed = " x ".join(str(s) for s in sizes if isinstance(s, int) and s not in CHANNELS)
        if fixed:
            return f" Bring the pictures to {fixed} first, as the model was trained on them."
        return ""
    if len(shape) == len(sizes) - 1:
        return " Stack the samples: the first dimension of a column counts them."
    return ""


def _told(found: Column) -> list[str]:
    where = f"column {found.name!r} of shape {found.shape}"
    if found.squeezed:
        return [f"{where}: each example has a batch of 1, which is left out"]
    if found.order:
        first = "first" if found.order[0] == 2 else "last"
        return [
            f"{where}: its channels are put {first}, where input {found.wanted.name!r} has them"
        ]
    return []


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _input(wanted: Wanted) -> str:
    sizes = ", ".join("?" if size is None else str(size) for size in wanted.shape)
    return f"{wanted.name!r} {wanted.dtype} ({sizes})"
