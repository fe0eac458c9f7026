"""An exported file: written, its parts, its size and digest."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.core.results import Artifact
from paredown.core.settings import check_arguments, require
from paredown.core.task import Target
from paredown.targets.runtimes import RUNTIMES, Batches, ready, runtime

if TYPE_CHECKING:
    from paredown.graph.model import Model


def size_bytes(file: Path) -> int:
    """Bytes on disk: the file with its companions, or all files of a folder."""
    if file.is_dir():
        return sum(each.stat().st_size for each in file.rglob("*") if each.is_file())
    weights = file.with_name(file.name + ".data")  # of an ONNX file that others made
    return sum(part.stat().st_size for part in [*parts(file), weights] if part.is_file())


def parts(path: Path) -> list[Path]:
    """The files that an artifact is made of: the one that is opened, then its companions.

    Example:
        >>> [each.name for each in parts(Path("model.onnx"))]
        ['model.onnx']
    """
    found = [runtime(name) for name in RUNTIMES]
    beside = {chosen.SUFFIX: chosen.COMPANIONS for chosen in found}.get(path.suffix, ())
    return [path, *(path.with_suffix(suffix) for suffix in beside)]


def companions(path: Path) -> list[Path]:
    """The files beside an artifact that opening it reads, as far as they are there; of an ONNX
    file that others made, its weights too.

    Example:
        >>> companions(Path("model.onnx"))
        []
    """
    weights = path.with_name(path.name + ".data")
    return [each for each in [*parts(path)[1:], weights] if each.is_file()]


def digest(path: Path) -> str:
    """SHA-256 over all bytes of an artifact, those of its companions last.

    Raises:
        OSError: one of its files cannot be read.
    """
    return sha256(itertools.chain.from_iterable(map(read_parts, parts(path))))


def check_kept(artifact: Artifact) -> Path:
    """The file of a run's artifact, where it is still the one that the run wrote.

    Raises:
        UserError: it is gone, cannot be read, or is another one; gives both SHA-256.
    """
    file = Path(artifact.path)
    again = "The same paredown run command writes it again."
    try:
        found = digest(file)
    except OSError as error:
        what = f"{error.filename or file}: cannot be read: {error.strerror or error}"
        raise UserError(f"{what}. {again}") from error
    if found != artifact.sha256:
        raise UserError(
            f"{file}: is damaged, or not the file of the run: its SHA-256 is {found}, and "
            f"run.json records {artifact.sha256}. {again}"
        )
    return file


def _check_batches(name: str, data: Any) -> None:
    """Refuse what is not, for each batch, a tensor for each input."""
    from torch import Tensor

    batches = isinstance(data, (tuple, list)) and all(isinstance(e, (tuple, list)) for e in data)
    fits = batches and all(isinstance(leaf, Tensor) for each in data for leaf in each)
    require(name, data, fits, "a list of batches, each a list of one tensor per input")


def export(model: Model, target: Target, path: str | Path, data: Batches = ()) -> Artifact:
    """Write the model as a file of the target's runtime; the file is checked against the model.

    Args:
        data: real inputs to check it on too, of the example's shapes, one tensor per input each.

    Raises:
        UserError: the runtime is not installed or cannot take the model, or the file differs from
            it or cannot be written.

    Example:
        >>> import tempfile, torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(model, Target(), f"{folder}/model.onnx")
        ...     paredown.open(artifact.path)(torch.zeros(3, 4).numpy())[0].shape
        (3, 2)
    """
    from paredown.graph.model import Model  # PyTorch, which `paredown --help` does not wait for

    check_arguments(model=(model, Model), target=(target, Target), path=(path, str | Path))
    _check_batches("data", data)
    written = ready(target.runtime).lower(model, path, data)
    size = sum(part.stat().st_size for part in parts(written))
    return Artifact(str(written), target.runtime, digest(written), size, "")
