"""What a run was started from, recorded and found again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from paredown.core.decode import decoded
from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.core.results import Run

PYTHON = ".py"


@dataclass(frozen=True)
class Samples:
    """What is brought beside a file that holds a model alone.

    Attributes:
        data: the samples; None where the file brings its own.
        task: the kind of task; None finds it out.
    """

    data: Path | None = None
    task: str | None = None


@dataclass(frozen=True)
class Source:
    """A file with a model, and the samples beside it where it has no task of its own.

    Attributes:
        file: a Python file, or one without source; "" where there is none.
        data: the samples; "" for a Python file, which brings them.
        task: the kind of task; "" where it is the file's own, or not known yet.
        seed: by which the samples are put into splits.
        sha256: of the file as it was.

    Example:
        >>> Source.from_json(Source("net.onnx", "x.npz").to_json()).data
        'x.npz'
    """

    file: str = ""
    data: str = ""
    task: str = ""
    seed: int = 0
    sha256: str = ""

    @property
    def is_python(self) -> bool:
        return Path(self.file).suffix == PYTHON

    @staticmethod
    def named(file: Path, samples: Samples, seed: int = 0) -> Source:
        """A file, whatever it may hold."""
        data = "" if samples.data is None else str(samples.data)
        return Source(str(file), data, samples.task or "", seed)

    @staticmethod
    def of(file: Path, samples: Samples, seed: int = 0) -> Source:
        """A file as it is now."""
        return replace(Source.named(file, samples, seed), sha256=digest(file))

    @staticmethod
    def kept(run: Run) -> Source:
        """What a run was started from; one without a file where it was started from Python."""
        found: Source = decoded(Source, run.details.get("source") or {}, "details.source")
        return found

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Source:
        found: Source = decoded(Source, json.loads(text))
        return found


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all that lies in a folder; "" where there is none.

    Example:
        >>> digest(Path("nowhere.py"))
        ''
    """
    try:
        return sha256(_parts(path)) if path.exists() else ""
    except OSError:
        return ""


def _parts(path: Path) -> Iterator[bytes]:
    if not path.is_dir():
        yield from read_parts(path)
        return
    for file in sorted(each for each in path.iterdir() if each.is_file()):
        yield f"{file.name}\0{file.stat().st_size}\0".encode()
        yield from read_parts(file)


def source_of(
    run: Run,
    verb: str,
    file: Path | None = None,
    samples: Samples | None = None,
    same: bool = False,
) -> Source:
    """What a run was started from, or what is named in its place.

    Args:
        verb: what asks, for the error.
        file, samples: that the user names now.
        same: whether the file must be as it was then, where nothing checks what it gives: one of
            its name that lies here by chance is another.

    Raises:
        UserError: there is none, it is not here, or another one is.
    """
    kept, now = Source.kept(run), samples or Samples()
    if file is not None:
        seed = kept.seed if kept.file else run.seed
        kept = replace(kept, file=str(file), sha256=digest(file), seed=seed)
        if kept.is_python:
            kept = replace(kept, data="", task="")
    if now.data is not None:
        kept = replace(kept, data=str(now.data))
    kept = replace(kept, task=now.task or kept.task)
    if not kept.file:
        raise UserError(f"{verb}: the run was not started from a file; name it with --file.")
    if not Path(kept.file).exists():
        raise UserError(f"{verb}: {kept.file}: no such file here; name it with --file.")
    if kept.data and not Path(kept.data).exists():
        raise UserError(f"{verb}: {kept.data}: no such samples here; name them with --data.")
    if same and kept.sha256 and digest(Path(kept.file)) != kept.sha256:
        raise UserError(
            f"{verb}: {kept.file}: is not the file that the run was started from, or has been "
            "changed since; name it with --file to use it all the same."
        )
    return kept


def found(folder: Path, verb: str) -> tuple[Source | None, str]:
    """What a run of a folder was started from, as it was then, or why there is none, in a
    sentence."""
    try:
        return source_of(Run.load(folder), verb, same=True), ""
    except UserError as error:
        return None, str(error)
