"""A predictor over any artifact, packed or not, or over that of a run."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import overload

from paredown.core.errors import UserError
from paredown.core.results import Run
from paredown.core.settings import MOST_THREADS, check_arguments, check_count
from paredown.core.task import Task
from paredown.ship.pipeline import Pipeline
from paredown.ship.predictor import Predictor
from paredown.targets import foreign
from paredown.targets.artifact import check_kept
from paredown.targets.runtimes import RUNTIMES, ready, runtime

PACKED = ".pare"  # what `paredown.pack` writes


@overload
def open(path: str | Path, threads: int = 1, task: None = None) -> Predictor: ...
@overload
def open(path: str | Path, threads: int = 1, *, task: Task) -> Pipeline: ...
def open(path: str | Path, threads: int = 1, task: Task | None = None) -> Predictor | Pipeline:
    """A predictor over an artifact, packed or not, or over the artifact of a run's folder.

    Args:
        task: whose preprocessing and postprocessing are run around it: then it takes examples as
            the task's splits give them.

    Raises:
        UserError: no such file, no runtime opens files of its kind or that one is not installed,
            or a damaged file or container; a folder without a finished run, or whose artifact has
            changed since.
    """
    check_arguments(path=(path, str | Path), task=(task, Task | None))
    check_count("threads", threads, most=MOST_THREADS)
    path, outputs = Path(path), None
    if path.is_dir():
        run = Run.load(path)
        if run.artifact is None:
            raise UserError(f"{path}: its run has no artifact.")
        path, outputs = check_kept(run.artifact), run.details.get("outputs")
    predictor = _predictor(path, threads)
    return predictor if task is None else Pipeline(predictor, task, outputs)


def _predictor(path: Path, threads: int) -> Predictor:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if path.suffix == PACKED:
        return _open_packed(path, threads)
    for name in RUNTIMES:
        if path.suffix == runtime(name).SUFFIX:
            return _opened(path, name, threads)
    able = ", ".join(runtime(name).SUFFIX for name in RUNTIMES)
    raise UserError(
        f"{path}: no runtime opens {path.suffix or 'such'} files; expected an artifact ({able}), a "
        f"{PACKED} container, or a run's folder."
    )


def _opened(path: Path, name: str, threads: int) -> Predictor:
    chosen = ready(name)
    foreign.check(path, name)
    try:
        predictor = chosen.open(path, threads)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: opening it in {chosen.version()} failed: {reason}") from error
    return Predictor(predictor, path, chosen.version(), threads)


def _open_packed(path: Path, threads: int) -> Predictor:
    """Unpacked into a folder that is there for as long as the predictor is."""
    from paredown.ship.pack.container import unpack

    folder = tempfile.TemporaryDirectory(prefix="paredown-")
    predictor = _predictor(unpack(path, folder.name), threads)
    weakref.finalize(predictor, folder.cleanup)
    return predictor
