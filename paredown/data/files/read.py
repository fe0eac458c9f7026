"""A path -> a table of samples, or one for each split that the path has itself."""

from __future__ import annotations

from pathlib import Path

from paredown.core.errors import UserError
from paredown.core.named import named
from paredown.core.task import SPLITS
from paredown.data.files.arrays import read_folder
from paredown.data.files.pictures import has_pictures, read_pictures
from paredown.data.files.saved import is_saved, read_saved
from paredown.data.files.table import Table

READERS = {  # of files, by their ending
    ".npz": "paredown.data.files.arrays:read_npz",
    ".npy": "paredown.data.files.arrays:read_npy",
    ".jsonl": "paredown.data.files.lines:read_lines",
}
EXPECTED = (
    "expected .npz, .npy or .jsonl, a folder of .npy files or of pictures (a folder for each "
    "class, or none), or a dataset saved by Hugging Face's save_to_disk"
)
NAMES = {  # of splits, as folders and files are called
    "train": "train",
    "training": "train",
    "calibration": "calibration",
    "calib": "calibration",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def read(path: Path) -> Table:
    """The samples of a file or folder that has no splits of its own.

    Raises:
        UserError: nothing there can be read as samples; says what was expected.

    Example:
        >>> import tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.savez(f"{folder}/x.npz", x=numpy.zeros((3, 2)))
        ...     len(read(Path(folder) / "x.npz"))
        3
    """
    if not path.exists():
        raise UserError(f"data: {path}: no such file or folder.")
    if path.is_dir():
        return _folder(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"data: {path}: {EXPECTED}.")
    found: Table = named(reader)(path)
    return found


def read_splits(path: Path) -> dict[str, Table]:
    """The samples by the split that they are in; under "" where the path has no splits.

    Splits are folders or files that are called so: ``train``, ``validation``, ``test`` and, if
    wanted, ``calibration``; a dataset saved by Hugging Face has its own.

    Raises:
        UserError: as `read`, or a split is there twice.
    """
    if not path.is_dir():
        return {"": read(path)}
    if is_saved(path):
        return _named(path, read_saved(path))
    inside = {
        each.stem if each.is_file() else each.name: each
        for each in sorted(path.iterdir())
        if each.is_dir() or each.suffix.lower() in READERS
    }
    if not inside or not {name.lower() for name in inside} <= set(NAMES):
        return {"": read(path)}
    if all(each.suffix.lower() == ".npy" for each in inside.values()) and len(inside) == 1:
        return {"": read(path)}  # one column of that name
    return _named(path, {name: read(each) for name, each in inside.items()})


def _named(path: Path, tables: dict[str, Table]) -> dict[str, Table]:
    if set(tables) == {""}:
        return tables
    found: dict[str, Table] = {}
    for name, table in tables.items():
        known = NAMES.get(name.lower())
        if known is None:
            raise UserError(
                f"data: {path}: has a split {name!r}; expected train, validation, test and "
                "perhaps calibration."
            )
        if known in found:
            raise UserError(f"data: {path}: its {known} split is there twice.")
        found[known] = table
    return {name: found[name] for name in SPLITS if name in found}


def _folder(path: Path) -> Table:
    if is_saved(path):
        tables = read_saved(path)
        if "" in tables:
            return tables[""]
        raise UserError(f"data: {path}: holds the splits {', '.join(tables)}; name their folder.")
    if any(path.glob("*.npy")):
        return read_folder(path)
    if has_pictures(path):
        return read_pictures(path)
    raise UserError(f"data: {path}: nothing in this folder can be read; {EXPECTED}.")
