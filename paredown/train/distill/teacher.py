"""What the teacher says of each example, kept on disk."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.units import human
from paredown.data import reading, splits
from paredown.data.feed import Feed
from paredown.graph import structure

TAUGHT = "paredown.taught"  # where a kept example has what the teacher says of it

Says = Callable[[Any], list[Tensor]]  # inputs of a batch -> what the teacher says, batch first


class Taught(Dataset[Any]):
    """A split whose targets also hold what the teacher says of each example."""

    def __init__(self, split: Dataset[Any], kept: list[np.ndarray[Any, Any]]):
        self.split, self.kept = split, kept

    def __len__(self) -> int:
        return splits.size(self.split)

    def __getitem__(self, index: int) -> Any:
        inputs, target = reading.pair(self.split[index])
        rows = [torch.from_numpy(np.array(each[index])) for each in self.kept]
        labels = {} if target is None else {"target": target}
        return inputs, {TAUGHT: rows, **labels}


def keep(given: Feed, says: Says, folder: Path) -> Taught:
    """Ask the teacher once about every example of a split and keep what it says in ``folder``.

    Raises:
        UserError: the data give other inputs each time, what the teacher says differs in shape
            from example to example, or the disk is full.
    """
    _check_repeats(given.data)
    count, paths = splits.size(given.data), None
    kept: list[Any] = []
    done = 0
    for batch in progress.track(given, "asking the teacher"):
        rows = [t.cpu() for t in says(batch.inputs)]
        if paths is None:
            paths = [folder / f"teacher-{number}.npy" for number in range(len(rows))]
            kept = _opened(paths, rows, count)
        for array, row in zip(kept, rows, strict=True):
            _check_rows(array, row, batch.size)
            array[done : done + batch.count] = row[: batch.count].numpy()
        done += batch.count
    total = human("size", sum(array.nbytes for array in kept))
    progress.say(f"  what the teacher says of {count} examples is kept on disk: {total}")
    return Taught(given.data, kept)


def _opened(paths: list[Path], rows: list[Tensor], count: int) -> list[Any]:
    """Arrays on disk for all examples, each like ``rows``."""
    shapes = [(count, *row.shape[1:]) for row in rows]
    needed = sum(row[0].nbytes * count for row in rows)
    free = shutil.disk_usage(paths[0].parent).free
    if needed > free:
        raise UserError(
            f"cache: what the teacher says takes {human('size', needed)}, and the disk has "
            f"{human('size', free)} left; make room, or leave cache off."
        )
    made = zip(paths, shapes, rows, strict=True)
    return [
        np.lib.format.open_memmap(path, "w+", row.numpy().dtype, shape) for path, shape, row in made
    ]


def _check_rows(array: Any, row: Tensor, count: int) -> None:
    if row.shape[1:] != array.shape[1:] or len(row) != count:
        raise UserError(
            f"cache: what the teacher says has shape {tuple(row.shape)} for {count} examples, "
            f"expected ({count}, {', '.join(map(str, array.shape[1:]))}): only values of one shape "
            "with the batch first can be kept; leave cache off."
        )


def _check_repeats(split: Dataset[Any]) -> None:
    """That the first examples are the same when they are read again."""
    for index in range(min(8, splits.size(split))):
        once, again = (structure.flatten(reading.pair(split[index])[0])[0] for _ in range(2))
        if not all(map(torch.equal, once, again)):
            raise UserError(
                "cache: the training data give another input each time (augmentation?), of which "
                "the teacher has to be asked anew; leave cache off."
            )


@contextlib.contextmanager
def room(folder: Path | None) -> Iterator[Path]:
    """The folder to keep things in: the run's, or one that is gone afterwards."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)
