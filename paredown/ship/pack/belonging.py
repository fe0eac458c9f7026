"""What is packed along with the file that is opened."""

from __future__ import annotations

from pathlib import Path

from paredown.graph.doors.onnx.beside import beside
from paredown.graph.doors.onnx.wire import outside
from paredown.targets.artifact import parts


def belonging(path: Path) -> list[Path]:
    """The files of an artifact: its parts, and the weights that an ONNX file keeps beside it.

    Raises:
        UserError: weights are missing, or lie in another folder, or behind a link.
        OSError: the file cannot be read.
    """
    try:
        named = outside(path) if path.suffix == ".onnx" else []
    except ValueError:
        named = []  # not what its name says
    return [*parts(path), *beside(path, named)]
