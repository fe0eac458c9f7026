"""What is validated: a finished run, or a single file with its task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.results import GOLDEN, Artifact, Run
from paredown.core.source import Source
from paredown.core.task import Task
from paredown.core.units import GOALS, Limit
from paredown.data import splits
from paredown.data.answer import fidelity_note
from paredown.data.load import load_source
from paredown.graph.model import Model
from paredown.measure.inputs import real_inputs
from paredown.run import golden
from paredown.run.golden import Golden
from paredown.run.ledger import MODEL, Ledger
from paredown.targets.artifact import check_kept, digest, size_bytes
from paredown.targets.runtimes import RUNTIMES, ready, runtime

ORIGINAL, COMPRESSED = "original", "compressed"


@dataclass(frozen=True)
class Subject:
    """What is validated, and what it is held against.

    Attributes:
        name: what it is called in a report.
        folder: where what is found goes.
        files: "compressed", and "original" where there is one; the SHA-256 of each is checked.
        model: the original's, where it is known: it tells the inputs and the outputs.
        task: whose test split is scored; None where it was not found.
        golden: None where there is none.
        run: None of a single file.
        notes: what is to be said beside the figures.
    """

    name: str
    folder: Path
    runtime: str
    files: dict[str, Path]
    sha256: str
    goals: Goals
    model: Model | None = None
    task: Task | None = None
    golden: Golden | None = None
    run: Run | None = None
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def lowered(self, name: str, folder: Path) -> Iterator[dict[str, Path]]:
        """The files for a runtime; for another than the run's, made anew from the run's stages.

        Raises:
            UserError: there is no run to make them from, or the runtime cannot take the model.
        """
        if name == self.runtime:
            yield self.files
            return
        if self.run is None or self.model is None:
            raise UserError(
                f"runtime: {self.name} is a file of {self.runtime}; for {name} give the run's "
                "folder, from which a file of it can be made."
            )
        chosen, stages = ready(name), {ORIGINAL: self.run.detail("model_sha256")}
        stages[COMPRESSED] = self.run.details.get("stage_sha256") or stages[ORIGINAL]
        made = {}
        with Ledger.reopen(_folder(self.run)) as ledger:
            for which, sha256 in stages.items():
                model = _stage(ledger, sha256)
                data = real_inputs(model, self.task) if self.task else []
                made[which] = chosen.lower(model, folder / f"{which}{chosen.SUFFIX}", data)
        yield made


def _folder(run: Run) -> Path:
    assert run.artifact is not None
    return Path(run.artifact.path).parent


def of_run(folder: Path, task: Task | None) -> Subject:
    """A finished run; its files and its golden set are checked by their SHA-256.

    Raises:
        UserError: no finished run there, without an artifact, or one of its files is another.
    """
    run = Run.load(folder)
    if run.artifact is None or run.original is None:
        raise UserError(f"{folder}: its run has no artifact.")
    files = {ORIGINAL: check_kept(run.original), COMPRESSED: check_kept(run.artifact)}
    kept, notes = run.details.get("golden"), []
    if not kept:
        notes.append("The run keeps no golden set, so outputs are compared with none.")
    with Ledger.reopen(folder) as ledger:
        model = _stage(ledger, run.detail("model_sha256"))
    if task is None:
        notes.append("No task was read, so nothing is scored; name its file with --file.")
    else:
        notes += fidelity_note(task)
        facts = run.data.get("test", {})
        found = task.test and splits.fingerprint(task.test)
        if facts and facts["fingerprint"] != found:
            notes.append("The test split is not the one of the run: scores are of other examples.")
    return Subject(
        run.name,
        folder,
        run.artifact.runtime,
        files,
        run.artifact.sha256,
        _goals(run),
        model,
        task,
        golden.read(folder / GOLDEN, kept["sha256"]) if kept else None,
        run,
        notes,
    )


def _goals(run: Run) -> Goals:
    given = dict(run.goals)
    limits = {name: Limit(**given[name]) for name in GOALS if isinstance(given.get(name), dict)}
    return Goals(**given | limits)


def _stage(ledger: Ledger, sha256: str) -> Model:
    path = ledger.get(sha256, MODEL)
    if path is None:
        raise UserError(f"{ledger.folder}: its stage {sha256[:12]} is gone; run it again.")
    return Model.load(path)


def of_file(file: Path, source: Source | None) -> Subject:
    """A single file, whose runtime its ending tells; a golden.npz beside it is taken.

    Raises:
        UserError: no such file, or no runtime that takes it.
    """
    from paredown.graph.capture import capture

    name = runtime_of(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file or folder.")
    there = file.with_name(GOLDEN)
    model, task = None, None
    if source is not None:
        module, task = load_source(source)
        task = splits.prepared(task)
        model = capture(module, task.example, task.dynamic)
    notes = [] if there.is_file() else [f"No {GOLDEN} lies beside it."]
    notes += fidelity_note(task) if task else ()
    if source is not None and Path(source.file) == file:
        notes.append("No original is named (--file): the file is held against itself.")
    if task is None:
        notes.append("No task is named (--file, --data), so nothing is scored.")
    if task is None and not there.is_file():
        raise UserError(
            f"{file}: there is nothing to hold it against: name its task with --file FILE.py, or "
            "its samples with --data, or "
            f"put the run's {GOLDEN} beside it."
        )
    return Subject(
        file.name,
        file.parent,
        name,
        {COMPRESSED: file},
        digest(file),
        Goals(),
        model,
        task,
        golden.read(there) if there.is_file() else None,
        notes=notes,
    )


def runtime_of(file: Path) -> str:
    """The runtime that takes a file, by its ending.

    Raises:
        UserError: none does.

    Example:
        >>> runtime_of(Path("model.onnx"))
        'onnxruntime'
    """
    known = {runtime(name).SUFFIX: name for name in reversed(RUNTIMES)}
    if file.suffix not in known and not file.exists():
        raise UserError(f"{file}: no such file or folder.")
    if file.suffix not in known:
        raise UserError(
            f"{file}: no runtime takes a file of that ending; expected {', '.join(sorted(known))}, "
            "or a run's folder. A .pare container is unpacked first, by paredown unpack."
        )
    return known[file.suffix]


def as_run(
    subject: Subject, runtime_name: str, target: dict[str, Any], measured: Measurement
) -> Run:
    """The run of a subject; of a single file, one that holds what is known of it."""
    if subject.run is not None:
        return subject.run
    file = subject.files[COMPRESSED]
    return Run(
        name=subject.name,
        created="",
        command="",
        goals={},
        target=target,
        versions={},
        data={},
        seed=0,
        plan=[],
        baseline=measured,
        trials=[],
        artifact=Artifact(str(file), runtime_name, subject.sha256, size_bytes(file), ""),
        original=None,
        on_device={},
        comparison=None,
        checks=[],
        met=True,
        verdict="",
        details={},
    )
