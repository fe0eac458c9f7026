"""The Python file that a run was started from, found again."""

from __future__ import annotations

import shlex
from pathlib import Path

from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.core.results import Run


def digest(command: str) -> str:
    """SHA-256 of the file that a command names; "" where it names none that is there.

    Example:
        >>> digest("paredown.compress(...)")
        ''
    """
    file = _named(command)
    try:
        return sha256(read_parts(file)) if file else ""
    except OSError:
        return ""


def source_of(run: Run, verb: str, option: str = "--file", same: bool = False) -> Path:
    """The file that the run's command named.

    Args:
        verb: what asks, for the error.
        option: by which the user may name a file.
        same: whether it must be as it was then, where nothing checks what it gives: one of its name
            that lies here by chance is another.

    Raises:
        UserError: there is none, it is not here, or another one is.
    """
    file = _named(run.command)
    if file is None:
        raise UserError(f"{verb}: the run was not started from a file; name it with {option}.")
    if not file.is_file():
        raise UserError(f"{verb}: {file}: no such file here; name it with {option}.")
    kept = run.details.get("source_sha256")
    if same and kept and digest(run.command) != kept:
        raise UserError(
            f"{verb}: {file}: is not the file that the run was started from, or has been changed "
            f"since; name it with {option} to use it all the same."
        )
    return file


def found(folder: Path, verb: str, option: str) -> tuple[Path | None, str]:
    """The file that a run of a folder was started from, as it was then, or why there is none, in a
    sentence."""
    try:
        return source_of(Run.load(folder), verb, option, same=True), ""
    except UserError as error:
        return None, str(error)


def _named(command: str) -> Path | None:
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    return next((Path(word) for word in words if word.endswith(".py")), None)
