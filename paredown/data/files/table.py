"""A table of samples: columns of as many rows each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from paredown.core.errors import UserError

LABELS = ("label", "labels", "y", "target", "targets")  # what a column of labels may be called


class Column(Protocol):
    """One value for each row, an array or a number or a text, read when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Any: ...


@dataclass(frozen=True)
class Table:
    """Columns of as many rows each.

    Attributes:
        source: where they came from, for what is said of them.
        columns: name -> values.
        named: False where the only column has no name of its own.
        classes: names of the classes that the column of labels counts; () where none are known.

    Raises:
        UserError: there is no column, no row, or columns are of several lengths.

    Example:
        >>> table = Table("x.npz", {"x": [[1.0], [2.0]], "label": [0, 1]})
        >>> len(table), table.label, table.row(1)
        (2, 'label', {'x': [2.0], 'label': 1})
    """

    source: str
    columns: dict[str, Column]
    named: bool = True
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.columns.items()}
        if not sizes:
            raise UserError(f"{self.source}: holds no samples.")
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(
                f"{self.source}: expected as many rows in every column, got {told}; the first "
                "dimension counts the samples."
            )
        if not min(sizes.values()):
            raise UserError(f"{self.source}: holds no samples; its columns are empty.")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def label(self) -> str | None:
        """The name of the column of labels; None where there is none."""
        return next((name for name in self.columns if name.lower() in LABELS), None)

    def row(self, index: int) -> dict[str, Any]:
        """All values of a row."""
        return {name: column[index] for name, column in self.columns.items()}

    def rows(self) -> Iterator[dict[str, Any]]:
        """All of them in order."""
        return (self.row(index) for index in range(len(self)))
