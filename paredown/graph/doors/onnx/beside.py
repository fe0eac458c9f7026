"""The files beside an ONNX file that its weights lie in: named by it, so looked at first."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from paredown.core.errors import UserError
from paredown.graph.doors.onnx.wire import Outside, outside


def weights_of(path: Path) -> list[Path]:
    """The files beside an ONNX file that it keeps tensors in, each one of its own.

    Raises:
        UserError: as `beside`, or it is damaged.
        OSError: it cannot be read.
    """
    try:
        named = outside(path)
    except ValueError as error:
        raise UserError(f"{path}: is no ONNX file, or a damaged one: {error}.") from error
    return beside(path, named)


def beside(path: Path, named: Sequence[Outside]) -> list[Path]:
    """The files beside another that its tensors lie in.

    Raises:
        UserError: one is missing, of another folder, behind a link, or shorter than what it is to
            hold.
    """
    return list(dict.fromkeys(_beside(path, each) for each in named))


def _beside(path: Path, named: Outside) -> Path:
    """The file that a tensor's bytes lie in."""
    told = f"{path}: keeps weights in {named.location!r}"
    file = path.parent / named.location
    if named.location in ("", ".") or "\0" in named.location:
        raise UserError(f"{told}, which names no file; it is damaged.")
    if named.location != Path(named.location).name or named.location == "..":
        raise UserError(
            f"{told}, in another folder; save the model with its weights in a file beside it."
        )
    try:
        found = file.lstat()
    except OSError as error:
        raise UserError(f"{told}, which is missing beside it.") from error
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise UserError(f"{told}, which is a link or no file; put a copy of the weights there.")
    end = found.st_size if named.length is None else named.offset + named.length
    if named.offset < 0 or (named.length or 0) < 0 or end > found.st_size:
        raise UserError(
            f"{told}, bytes {named.offset} to {end}, and that file has {found.st_size}; it is "
            "damaged, or belongs to another model."
        )
    return file
