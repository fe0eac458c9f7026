"""A Hugging Face dataset as its ``save_to_disk`` leaves it: Arrow files beside JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.data.files.pictures import decoded
from paredown.data.files.table import Column, Table

ONE, SEVERAL = "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class Saved:
    """A column of such a dataset; pictures come as arrays."""

    data: Any
    name: str

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        value = self.data[int(row)][self.name]
        return decoded(value) if hasattr(value, "convert") else _plain(value)


def _plain(value: Any) -> Any:
    return np.asarray(value) if isinstance(value, list) else value


def is_saved(path: Path) -> bool:
    return (path / ONE).is_file() or (path / SEVERAL).is_file()


def read_saved(path: Path) -> dict[str, Table]:
    """The tables of a saved dataset by their names; of one without splits under "".

    Raises:
        UserError: the package is missing, or the folder is damaged.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: a saved dataset is read by the datasets package: "
            "pip install 'paredown[huggingface]'."
        ) from error
    load: Callable[[str], Any] = datasets.load_from_disk
    try:
        found = load(str(path))
    except Exception as error:
        raise UserError(f"{path}: is no saved dataset, or a damaged one: {error}") from error
    several = isinstance(found, datasets.DatasetDict)
    parts = dict(found) if several else {"": found}
    return {name: _table(path, name, data) for name, data in parts.items()}


def _table(path: Path, name: str, data: Any) -> Table:
    columns: dict[str, Column] = {
        each: Saved(data.select_columns([each]), each) for each in data.column_names
    }
    where = f"{path} ({name})" if name else str(path)
    table = Table(where, columns)
    classes = getattr(data.features.get(table.label), "names", None) if table.label else None
    return Table(where, columns, classes=tuple(classes or ()))
