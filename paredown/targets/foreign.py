"""Files that others made: looked at, and opened in a process of their own, before they are here.

A runtime trusts what it opens: a damaged file crashes it, or takes all memory; an ONNX file names
others to read, which may be any of this machine's. So the first time that a file is opened, a child
process with bounds on memory and time opens it, and may crash.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from paredown.core import cache
from paredown.core.errors import UserError
from paredown.targets.artifact import digest
from paredown.targets.devices.local import Probe, physical_memory
from paredown.targets.formats.onnx.wire import Outside, outside
from paredown.targets.runtimes import runtime, source

OPENED_S, EACH_S = 60.0, 5e-8  # the longest that opening may take, and more for each byte
LEAST_BYTES, TIMES = 2 * 2**30, 12  # of memory that it may take: so many, and so often the file's


def check(path: Path, name: str) -> None:
    """Refuse a file that its runtime cannot open, or that would have it read others than its own.

    What was found holds for the same bytes in the same version of the runtime, and is kept.

    Args:
        name: of the runtime.

    Raises:
        UserError: says what is wrong with the file.
    """
    chosen = runtime(name)
    weights = weights_of(path) if chosen.SUFFIX == ".onnx" else []
    try:
        held = sum(each.stat().st_size for each in (path, *weights))
        key = {"file": digest(path), "beside": [digest(each) for each in weights]}
    except OSError as error:
        what = error.filename or path
        raise UserError(f"{what}: cannot be read: {error.strerror or error}.") from error
    memory = min(physical_memory(), LEAST_BYTES + TIMES * held)

    def opened() -> dict[str, bool]:
        timeout_s = OPENED_S + EACH_S * held
        code = source(name)
        with Probe(path, code, timeout_s=timeout_s, fresh=False, memory_bytes=memory):
            return {"opens": True}

    cache.kept("opens", key | {"runtime": chosen.version()}, opened, lambda found: found)


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
