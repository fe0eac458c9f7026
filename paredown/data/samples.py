"""Rows of a table as examples of a split, with their labels where they have some."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core.errors import UserError
from paredown.data.files.table import Column, Table

LOOKED_AT = 16  # labels that are looked at, where each is more than a number


@dataclass(frozen=True)
class Labels:
    """A column of labels as targets.

    Attributes:
        numbers: of labels that are texts; None where they are numbers.
        one_hot: whether each is a row with a 1 in the place of its class.
    """

    column: Column
    source: str
    numbers: dict[str, int] | None = None
    one_hot: bool = False

    def array(self, row: int) -> np.ndarray:
        """Of one row: whole numbers as int64, others as float32.

        Raises:
            UserError: it is a text that is no class.
        """
        value = self.column[row]
        if self.numbers is not None:
            if str(value) not in self.numbers:
                raise UserError(f"{self.source}: example {row}: {str(value)!r} is no known class.")
            return np.asarray(self.numbers[str(value)])
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise UserError(f"{self.source}: example {row}: its label is no number.")
        if self.one_hot:
            return np.asarray(int(array.argmax()))
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int64)

    def tensor(self, row: int) -> Tensor:
        return torch.from_numpy(np.asarray(self.array(row)))

    def some(self) -> np.ndarray:
        """All that are one number each, else the first few, of one shape.

        Raises:
            UserError: they are of several shapes.
        """
        first = self.array(0)
        rows = (
            range(len(self.column)) if not first.ndim else range(min(LOOKED_AT, len(self.column)))
        )
        found = [self.array(row) for row in rows]
        other = next((n for n, each in enumerate(found) if each.shape != first.shape), None)
        if other is not None:
            raise UserError(
                f"{self.source}: the label of example {other} has shape {found[other].shape}, and "
                f"that of the first {first.shape}; pad or cut them to one."
            )
        return np.stack(found)


def labels_of(
    table: Table, inputs: Sequence[str], classes: Sequence[str]
) -> tuple[Labels | None, list[str]]:
    """The labels of a table, and what was done with them.

    Args:
        inputs: of the model; a column that is one is none of labels.
        classes: names of the model's classes, as far as its file tells them.

    Raises:
        UserError: they are texts, and nothing says which class each is.
    """
    name = table.label
    if name is None or name in inputs:
        return None, []
    column, known = table.columns[name], {each: n for n, each in enumerate(classes)}
    made = Labels(column, table.source)
    if table.classes:
        if set(table.classes) <= set(known):
            return _numbered(made, table.classes, known)
        counted = f"0 is {table.classes[0]!r}, {len(table.classes) - 1} is {table.classes[-1]!r}"
        return made, [f"{table.source}: classes are counted in the order of their names: {counted}"]
    first = column[0]
    if isinstance(first, (str, bytes)):
        if str(first) not in known:
            raise UserError(
                f"{table.source}: column {name!r} holds texts such as {str(first)!r}, and the "
                "model's file does not say which class that is; give the numbers of the classes."
            )
        return Labels(column, table.source, known), []
    if _is_one_hot(column):
        made = Labels(column, table.source, one_hot=True)
        return made, [f"{table.source}: column {name!r} marks each class by a 1 in its place"]
    return made, []


def _numbered(
    made: Labels, names: Sequence[str], known: dict[str, int]
) -> tuple[Labels, list[str]]:
    """Labels that count other names than the model's, by the model's numbers."""
    texts = [names[int(made.column[row])] for row in range(len(made.column))]
    return Labels(texts, made.source, known), []


def _is_one_hot(column: Column) -> bool:
    rows = [np.asarray(column[n]) for n in range(min(LOOKED_AT, len(column)))]
    return all(
        row.ndim == 1
        and len(row) > 1
        and row.dtype.kind in "biuf"
        and sorted(row.tolist())[-2:] == [0, 1]
        and row.sum() == 1
        for row in rows
    )


class Samples(Dataset[Any]):
    """Rows of a table as ``(inputs, target)``, or ``(inputs,)`` without labels.

    Args:
        rows: of the table, in the order of the split.
        inputs: makes the inputs of a row.
    """

    def __init__(
        self, rows: np.ndarray, inputs: Callable[[int], Any], labels: Labels | None = None
    ) -> None:
        self.rows, self.inputs, self.labels = rows, inputs, labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = int(self.rows[index])
        made = self.inputs(row)
        return (made,) if self.labels is None else (made, self.labels.tensor(row))
