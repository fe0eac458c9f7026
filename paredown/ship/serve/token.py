"""The token that moves a rollout by hand: made once, kept for its owner alone."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from paredown.core.errors import UserError

FILE = "token"
LEAST = 16  # characters


def token(folder: Path, file: Path | None) -> tuple[str, bool]:
    """The token, and whether it was made now.

    Args:
        file: one of the user's; None for that of the state's folder.

    Raises:
        UserError: the file cannot be read, or holds no token.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made, now = token(Path(folder), None)
        ...     again = token(Path(folder), None)
        >>> now, again == (made, False)
        (True, True)
    """
    path = file or folder / FILE
    if file is None and not path.exists():
        return _made(path), True
    return read(path), False


def read(path: Path) -> str:
    """The token in a file.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        found = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no token can be read there: {error}.") from error
    if len(found) < LEAST or len(found.split()) != 1:
        raise UserError(f"{path}: expected a token, one word of {LEAST} characters or more.")
    return found


def _made(path: Path) -> str:
    made = secrets.token_urlsafe(24)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(made + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}.") from error
    return made
