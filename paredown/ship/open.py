"""A predictor over any artifact, packed or not."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

from paredown.core.errors import UserError
from paredown.targets.runtimes import RUNTIMES, Predictor, ready, runtime

PACKED = ".pare"  # what `paredown.pack` writes


def open(path: str | Path, threads: int = 1) -> Predictor:
    """A predictor over an artifact, packed or not: one array per input in, a tuple of arrays out.

    Raises:
        UserError: no such file, no runtime opens files of its kind or that one is not installed,
            or a damaged container.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.suffix == PACKED:
        return _open_packed(path, threads)
    for name in RUNTIMES:
        chosen = runtime(name)
        if path.suffix == chosen.SUFFIX:
            return ready(name).open(path, threads)
    raise UserError(f"{path}: no runtime opens {path.suffix or 'such'} files.")


def _open_packed(path: Path, threads: int) -> Predictor:
    """Unpacked into a folder that is there for as long as the predictor is."""
    from paredown.ship.pack.container import unpack

    folder = tempfile.TemporaryDirectory(prefix="paredown-")
    predictor = open(unpack(path, folder.name), threads)
    weakref.finalize(predictor, folder.cleanup)
    return predictor
