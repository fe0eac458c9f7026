"""Runtimes by name. Each is a module with

- ``SUFFIX`` of the file that is opened, and ``COMPANIONS``, the suffixes of those beside it;
- ``FORMS``, what it can write besides float32 (see `paredown.types.Step`), and ``INT8_BYTES``, what
  integers add to a file for each channel and for each layer: None where they are only simulated;
- ``SYMMETRIC``, where there are such: bits of weights alone that may have no zero points;
- ``PACKAGES``, the distributions it needs; the extra that installs them has the runtime's name;
- ``lower(model, path)``, ``open(path, threads)``, ``census(path)`` and ``version()``.
"""

from __future__ import annotations

import hashlib
import importlib
import tempfile
import weakref
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.types import Artifact, Target, UserError

if TYPE_CHECKING:
    from paredown.graph.model import Model

PACKED = ".pare"  # what `paredown.pack` writes
RUNTIMES = {
    "onnxruntime": "paredown.runtimes.onnxruntime",
    "openvino": "paredown.runtimes.openvino",
    "pytorch": "paredown.runtimes.pytorch",
    "executorch": "paredown.runtimes.executorch",
    "litert": "paredown.runtimes.litert",
}
CORE = ("onnxruntime", "pytorch")  # installed with paredown; each other one has its extra


def runtime(name: str) -> Any:
    """The runtime's module.

    Raises:
        UserError: no such runtime.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime: {name!r} is not one of {', '.join(RUNTIMES)}.")
    return importlib.import_module(RUNTIMES[name])


def ready(name: str) -> Any:
    """The runtime's module, all that it needs being installed.

    Raises:
        UserError: no such runtime, or one of its packages is not installed.
    """
    chosen = runtime(name)
    missing = [package for package in chosen.PACKAGES if not _installed(package)]
    if missing:
        raise UserError(
            f"runtime: {name} needs {' and '.join(missing)}, not installed here; run "
            f"pip install {'paredown' if name in CORE else repr(f'paredown[{name}]')}."
        )
    return chosen


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def parts(path: Path) -> list[Path]:
    """The files that an artifact is made of: the one that is opened, then its companions.

    Example:
        >>> [each.name for each in parts(Path("model.onnx"))]
        ['model.onnx']
    """
    found = [runtime(name) for name in RUNTIMES]
    beside = {chosen.SUFFIX: chosen.COMPANIONS for chosen in found}.get(path.suffix, ())
    return [path, *(path.with_suffix(suffix) for suffix in beside)]


def digest(path: Path) -> str:
    """SHA-256 over all bytes of an artifact, those of its companions last.

    Raises:
        OSError: one of its files cannot be read.
    """
    made = hashlib.sha256()
    for part in parts(path):
        with part.open("rb") as file:
            while block := file.read(2**20):
                made.update(block)
    return made.hexdigest()


def export(model: Model, target: Target, path: str | Path) -> Artifact:
    """Write the model as a file of the target's runtime; the file is checked against the model.

    Raises:
        UserError: the runtime is not installed or cannot take the model, or the file differs from
            it or cannot be written.

    Example:
        >>> import tempfile, torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(model, Target(), f"{folder}/model.onnx")
        ...     open(artifact.path)(torch.zeros(3, 4).numpy())[0].shape
        (3, 2)
    """
    written: Path = ready(target.runtime).lower(model, path)
    size = sum(part.stat().st_size for part in parts(written))
    return Artifact(str(written), target.runtime, digest(written), size, "")


def open(path: str | Path, threads: int = 1) -> Any:
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


def _open_packed(path: Path, threads: int) -> Any:
    """Unpacked into a folder that is there for as long as the predictor is."""
    from paredown.pack import unpack

    folder = tempfile.TemporaryDirectory(prefix="paredown-")
    predictor = open(unpack(path, folder.name), threads)
    weakref.finalize(predictor, folder.cleanup)
    return predictor
