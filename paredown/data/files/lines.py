"""Files of JSON lines: one sample each, an object of numbers, lists of numbers and texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.data.files.table import Column, Table

ALONE = "value"  # the name of the column of lines that are no objects


def read_lines(path: Path) -> Table:
    """The samples of a ``.jsonl`` file: a column for each key, or one where lines are lists.

    Raises:
        UserError: a line is no JSON, lacks a key, or holds something else; names the line.
    """
    rows, named = _rows(path)
    keys = list(rows[0]) if rows else []
    for number, row in enumerate(rows, 1):
        other = [*(key for key in keys if key not in row), *(key for key in row if key not in keys)]
        if other:
            raise UserError(
                f"{path}: line {number} has the keys {', '.join(row) or 'none'}, and line 1 "
                f"{', '.join(keys)}; every sample needs the same."
            )
    columns = {key: _column(path, key, [row[key] for row in rows]) for key in keys}
    return Table(str(path), columns, named=named)


def _rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    rows: list[dict[str, Any]] = []
    named = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                value = _parsed(path, number, line)
                named = isinstance(value, dict)
                rows.append(value if isinstance(value, dict) else {ALONE: value})
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text in UTF-8: {error}.") from error
    return rows, named


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: line {number} is no JSON: {error}; every line holds one sample."
        ) from error


def _column(path: Path, key: str, values: list[Any]) -> Column:
    """Texts as they are; numbers and lists of them as arrays, stacked where all have one shape."""
    texts = [isinstance(value, str) for value in values]
    if all(texts):
        return values
    made = [_array(path, key, number, value) for number, value in enumerate(values, 1)]
    floats = any(array.dtype.kind == "f" for array in made)
    made = [array.astype(np.float64) if floats else array for array in made]
    same = len({(array.shape, array.dtype) for array in made}) == 1
    return np.stack(made) if same else made


def _array(path: Path, key: str, number: int, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        kind = "lists of several lengths" if isinstance(value, list) else type(value).__name__
        raise UserError(
            f"{path}: line {number}: {key!r}: expected a number, a text, or a list of numbers of "
            f"one length at each depth, got {kind}."
        )
    return array
