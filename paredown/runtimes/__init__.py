"""Runtimes by name; each is a module with ``lower(model, path)`` and ``open(path, threads)``."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.types import Artifact, Target, UserError

if TYPE_CHECKING:
    from paredown.graph.model import Model

RUNTIMES = {
    "onnxruntime": "paredown.runtimes.onnxruntime",
    "pytorch": "paredown.runtimes.pytorch",
}


def runtime(name: str) -> Any:
    """The runtime's module.

    Raises:
        UserError: no such runtime.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime: {name!r} is not one of {', '.join(RUNTIMES)}.")
    return importlib.import_module(RUNTIMES[name])


def export(model: Model, target: Target, path: str | Path) -> Artifact:
    """Write the model as a file of the target's runtime; the file is checked against the model.

    Raises:
        UserError: the runtime cannot take the model, the file differs from it, or cannot be
            written.

    Example:
        >>> import tempfile, torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(model, Target(), f"{folder}/model.onnx")
        ...     open(artifact.path)(torch.zeros(3, 4).numpy())[0].shape
        (3, 2)
    """
    written: Path = runtime(target.runtime).lower(model, path)
    raw = written.read_bytes()
    return Artifact(str(written), target.runtime, hashlib.sha256(raw).hexdigest(), len(raw), "")


def open(path: str | Path, threads: int = 1) -> Any:
    """A predictor over an artifact: one array per input in, a tuple of arrays out.

    Raises:
        UserError: no such file, or no runtime opens files of its kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    for name in RUNTIMES:
        chosen = runtime(name)
        if path.suffix == chosen.SUFFIX:
            return chosen.open(path, threads)
    raise UserError(f"{path}: no runtime opens {path.suffix or 'such'} files.")
