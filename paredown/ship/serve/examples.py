"""Real inputs of a task for a file's validation, read in a process of their own.

The task is a user's Python file and needs PyTorch, which the server itself does without.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.core.source import Source

SPLITS = ("validation", "test")
MOST, MOST_BYTES = 512, 2**28
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile)
NOT_KEPT = 3  # the child's exit status where the state's folder cannot be written
READ_S = 600.0  # the longest that the user's file may take
FILE, RAW_FILE = "examples.npz", "raw_examples.npz"


@dataclass(frozen=True)
class Examples:
    """The examples of a task, kept in a folder.

    Attributes:
        task: where they come from; None where they are kept already.
        raw: before the task's preprocessing, as a server takes them that runs end to end.
        golden: the run's golden set, whose inputs do where there is no task; None for none.
        lacking: why there is no task, in a sentence; "" where there is one.
    """

    folder: Path
    task: Source | None
    raw: bool = False
    golden: Path | None = None
    lacking: str = ""

    @property
    def source(self) -> str:
        """Where they come from, in words."""
        gone = f" ({self.lacking.rstrip('.')})" if self.lacking else ""
        return f"{self._told or self.golden or 'no task'}{gone}"

    @property
    def _told(self) -> str:
        return " with ".join(filter(None, [self.task.file, self.task.data])) if self.task else ""

    @property
    def file(self) -> Path:
        return self.folder / (RAW_FILE if self.raw else FILE)

    def read(self) -> list[list[np.ndarray]]:
        """The examples that are kept: one array per input each, with a batch dimension of 1.

        Raises:
            OSError, ValueError, KeyError: there are none.
        """
        with np.load(self.file, allow_pickle=False) as kept:
            columns = [kept[str(place)] for place in range(len(kept.files))]
        columns = [each.astype(object) if each.dtype.kind == "S" else each for each in columns]
        return [[column[n : n + 1] for column in columns] for n in range(len(columns[0]))]

    def make(self, names: Sequence[str]) -> None:
        """Read examples of the task in a child process, and keep them.

        Args:
            names: of the file's inputs.

        Raises:
            UserError: there is no task, the user's file fails, its examples do not fit, or the
                folder has no room for them.
        """
        if self.task is None and self.golden is not None:
            _keep(self.file, of_golden(self.golden))
            return
        if self.task is None:
            why = self.lacking or "Name a file with --file."
            raise UserError(f"there are no examples to validate on. {why}")
        kind = "raw" if self.raw else "ready"
        command = [
            sys.executable,
            "-m",
            __name__,
            self.task.to_json(),
            str(self.file),
            kind,
            *names,
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=READ_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            said = f"reading its examples took more than {READ_S:g} s"
            raise UserError(f"{self._told}: {said}.") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no word"])[-1]
            if done.returncode == NOT_KEPT:
                raise UserError(said)
            raise UserError(f"{self._told}: its examples cannot be read: {said}")


def of_golden(path: Path) -> list[np.ndarray]:
    """The inputs of a golden set, all its examples stacked by input.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        with np.load(path, allow_pickle=False) as kept:
            names = [name.split(".") for name in kept.files if name.startswith("inputs.")]
            found = {
                (int(batch), int(place)): kept[f"inputs.{batch}.{place}"]
                for _, batch, place in names
            }
        batches = sorted({batch for batch, _ in found})
        rows = [
            [found[batch, place][n] for place in sorted(p for b, p in found if b == batch)]
            for batch in batches
            for n in range(len(found[batch, 0]))
        ]
        return columns(rows)
    except UNREADABLE as error:
        raise UserError(f"{path}: no golden set can be read there: {error}") from error


def columns(rows: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Examples of one shape, all that have the first one's, stacked by input.

    Example:
        >>> rows = [[np.zeros(2)], [np.ones(2)], [np.ones(3)]]
        >>> [column.shape for column in columns(rows)]
        [(2, 2)]
    """
    shapes = [array.shape for array in rows[0]]
    fitting = [row for row in rows if [array.shape for array in row] == shapes]
    size = sum(array.nbytes for array in rows[0])
    fitting = fitting[: max(1, MOST_BYTES // max(1, size))]
    return [np.stack(each) for each in zip(*fitting, strict=True)]


def ordered(inputs: Any, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of one example's inputs in the order of the file's.

    Raises:
        UserError: there are others.

    Example:
        >>> ordered({"b": np.ones(1), "a": np.zeros(2)}, ["a", "b"])[0].shape
        (2,)
    """
    if isinstance(inputs, Mapping):
        found = _flat(inputs, "")
        if sorted(found) != sorted(names):
            raise UserError(f"the file takes {', '.join(names)}, the split has {', '.join(found)}")
        return [_array(found[name]) for name in names]
    leaves = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    if len(leaves) != len(names):
        raise UserError(f"the file takes {len(names)} inputs, the split has {len(leaves)}")
    return [_array(leaf) for leaf in leaves]


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.encode() if isinstance(leaf, str) else leaf)


def _flat(given: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _write(source: Source, made: Path, raw: bool, names: Sequence[str]) -> None:
    from paredown.data import reading, splits
    from paredown.data.load import task_of

    loaded = task_of(source)
    name = next((each for each in SPLITS if getattr(loaded, each) is not None), None)
    if name is None:
        raise UserError(f"its task has no {' or '.join(SPLITS)} split")
    data = getattr(loaded if raw else splits.prepared(loaded), name)
    picked = range(min(MOST, reading.size(data)))
    rows = [reading.examples(data, [n], 0)[0] for n in picked]
    arrays = [ordered(reading.pair(row, name)[0], names) for row in rows]
    _keep(made, columns(arrays))


def _keep(made: Path, stacked: Sequence[np.ndarray]) -> None:
    """Write them; the file is whole or not there.

    Raises:
        _NotKept: the folder cannot be written.
    """
    found = {str(place): column for place, column in enumerate(stacked)}
    part = made.with_suffix(".part")
    try:
        with part.open("wb") as file:
            np.savez(file, **found)  # type: ignore[arg-type]
        part.replace(made)
    except OSError as error:
        part.unlink(missing_ok=True)
        said = f"{made}: the examples cannot be kept: {error.strerror or error}."
        raise _NotKept(said) from error


class _NotKept(UserError):
    """It is the state's folder that fails, and not the user's file."""


def main() -> None:
    """Write the examples of the task and to the file that the command line names."""
    task, made, kind, *names = sys.argv[1:]
    try:
        _write(Source.from_json(task), Path(made), kind == "raw", names)
    except _NotKept as error:
        print(error, file=sys.stderr)
        sys.exit(NOT_KEPT)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
