"""What is packed along with the file that is opened."""

from __future__ import annotations

from pathlib import Path

from paredown.core.errors import UserError
from paredown.ship.pack import find
from paredown.targets.artifact import parts


def belonging(path: Path) -> list[Path]:
    """The files of an artifact: its parts, and the weights that an ONNX file keeps beside it.

    Raises:
        UserError: weights are missing, or lie in another folder.
        OSError: the file cannot be read.
    """
    found = parts(path)
    for name in find.external_files(path):
        if name != Path(name).name:
            raise UserError(
                f"{path}: keeps weights in {name!r}, in another folder; a container holds files of "
                "one folder: save the model with its weights beside it."
            )
        weights = path.with_name(name)
        if not weights.is_file():
            raise UserError(f"{path}: keeps weights in {name!r}, which is missing beside it.")
        found.append(weights)
    return found
