"""Files that are whole or not there, and the failpoints that let the tests prove it."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import secrets
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from paredown.core.errors import UserError

FAILPOINT = "PAREDOWN_FAILPOINT"  # "name:action" in the environment; see `failpoint`
FILE_POINTS = ("before-write", "after-write", "after-fsync", "after-rename", "after-folder-fsync")
Data = (
    bytes | Iterable["bytes | memoryview"]
)  # of a file: whole, or in parts that follow each other
_TEMPORARY = (".paredown-", ".tmp")  # how the name of an unfinished file begins and ends


def failpoint(name: str, short: Callable[[], object] | None = None) -> None:
    """Fail here if the environment asks for it: how the tests crash a run at a chosen place.

    ``PAREDOWN_FAILPOINT="name:action"``, with the action ``kill`` (SIGKILL to this process),
    ``enospc`` or ``eio`` (OSError), or ``short`` (call ``short``, which writes a part, then kill).
    """
    wanted, _, action = os.environ.get(FAILPOINT, "").partition(":")
    if wanted != name:
        return
    if action in ("enospc", "eio"):
        code = getattr(errno, action.upper())
        raise OSError(code, os.strerror(code))
    if action == "short" and short is not None:
        short()
    os.kill(os.getpid(), signal.SIGKILL)


def parts_of(data: Data) -> Iterable[bytes | memoryview]:
    """What a file holds, part by part."""
    return (data,) if isinstance(data, bytes) else data


def write_synced(handle: int, data: Data, point: str) -> None:
    """Write all of ``data`` and fsync; ``point`` begins the names of the failpoints in between.

    Raises:
        OSError: what the disk said. After a failed fsync nothing is known of what was written,
            so it is never retried.
    """
    for number, part in enumerate(parts_of(data)):
        rest = memoryview(part)
        if not number:
            failpoint(f"{point}-before-write", functools.partial(_half, handle, rest))
        while rest:
            rest = rest[os.write(handle, rest) :]
    failpoint(f"{point}-after-write")
    os.fsync(handle)
    failpoint(f"{point}-after-fsync")


def _half(handle: int, part: memoryview) -> None:
    os.write(handle, part[: len(part) // 2])


def write_atomically(path: Path, data: Data) -> None:
    """Write, fsync, rename, fsync the folder: the file is whole or not there.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    name = f"{_TEMPORARY[0]}{secrets.token_hex(8)}{_TEMPORARY[1]}"
    temporary = path.parent / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                write_synced(handle, data, "file")
            finally:
                os.close(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        failpoint("file-after-rename")
        sync_folder(path.parent)
        failpoint("file-after-folder-fsync")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}.") from error


def sha256(data: Data) -> str:
    """The digest of what a file holds.

    Example:
        >>> sha256(b"ab") == sha256([b"a", b"b"])
        True
    """
    made = hashlib.sha256()
    for part in parts_of(data):
        made.update(part)
    return made.hexdigest()


def read_parts(path: Path) -> Iterator[bytes]:
    """What a file holds, a mebibyte at a time.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while part := file.read(2**20):
            yield part


def write_together(files: Mapping[Path, Data]) -> None:
    """Write the files of one artifact, the first of which is opened: it is whole with all the
    others, or not there.

    Raises:
        UserError: as `write_atomically`.
    """
    (first, data), *others = files.items()
    if others and first.exists():  # else it would stand beside another's companions for a while
        first.unlink()
        sync_folder(first.parent)
    for path, beside in others:
        write_atomically(path, beside)
    write_atomically(first, data)


def beside(file: Path, named: str) -> str:
    """A path that a file names: what lies in that file's folder, else, or where nothing does, as it
    is, from the current folder.

    Example:
        >>> beside(Path("recipes/own.toml"), "gone.py")
        'gone.py'
    """
    there = file.parent / named
    return str(there) if named and there.is_file() else named


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` as durable as the files' contents."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Whether ``name`` is of a file that `write_atomically` did not finish.

    Example:
        >>> is_temporary(".paredown-00ff.tmp"), is_temporary("model.onnx")
        (True, False)
    """
    return name.startswith(_TEMPORARY[0]) and name.endswith(_TEMPORARY[1])
