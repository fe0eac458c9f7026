"""The doors for files that come without source, by their ending."""

from __future__ import annotations

from pathlib import Path

from paredown.core.errors import UserError
from paredown.core.named import named
from paredown.graph.doors.opened import Opened
from paredown.graph.doors.other_files import told

DOORS: dict[str, str] = {  # the ending, or the file that makes a folder one -> its door
    ".h5": "paredown.graph.doors.keras.door:open_keras",
    ".hdf5": "paredown.graph.doors.keras.door:open_keras",
    ".keras": "paredown.graph.doors.keras.door:open_keras",
    ".onnx": "paredown.graph.doors.onnx.door:open_onnx",
    "config.json": "paredown.graph.doors.huggingface.door:open_folder",
}


def ending(path: Path) -> str | None:
    """The key of ``DOORS`` that a path goes by; None where it has no such door.

    Example:
        >>> ending(Path("weights.pt")) is None
        True
    """
    if path.is_dir():
        return next((name for name in DOORS if (path / name).is_file()), None)
    return path.suffix if path.suffix in DOORS else None


def open_file(path: Path) -> Opened:
    """The model in a file or folder that has no source.

    Raises:
        UserError: there is none, it is damaged, or something in it cannot be taken; says what.
    """
    door = ending(path)
    if door is None or not path.exists():
        raise UserError(told(path))
    found: Opened = named(DOORS[door])(path)
    return found
