"""What a finished run leaves in its folder, and whether it is of the same task."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from paredown.core import progress
from paredown.core.files import read_parts, write_atomically, write_together
from paredown.core.results import GOLDEN, Artifact, Run
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.data.answer import answer_from
from paredown.report.page import report
from paredown.run.identity import ignore_of
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.targets.artifact import digest, parts, size_bytes


def write(
    run: Run, folder: Path, artifact: Path, original: Path, golden: Path | None = None
) -> Run:
    """The folder's results: artifact and original, golden set, recipe, run.json, report.html; each
    whole or not there. Returns the run by where its files lie."""
    assert run.artifact is not None and run.original is not None
    progress.say(f"Results in {folder}")
    run.details["folder"] = str(folder)
    run.details["reproduce"] = [
        run.command or "paredown.compress(...)",
        f"paredown replay {shlex.quote(str(folder))}",
    ]
    for name, file in ((run.artifact.path, artifact), (run.original.path, original)):
        given = map(read_parts, parts(file))
        write_together(dict(zip(parts(folder / name), given, strict=True)))
    if golden is not None:
        write_atomically(folder / GOLDEN, read_parts(golden))
    write_atomically(folder / "recipe.toml", run.artifact.recipe.encode())
    write_atomically(folder / "run.json", run.to_json().encode())
    report(run, folder / "report.html")
    return run.within(folder)


def changed_task(run: Run, task: Task) -> Iterator[str]:
    """What of a task is not as it was in the run."""
    if task.batch_size != run.detail("batch_size"):
        yield "the task's batch_size"
    if ignore_of(task).get("ignore") != run.details.get("ignore"):
        yield "the task's ignore"
    kept, now = (run.details.get("source") or {}).get("task"), answer_from(task)
    if kept and (now is None or now.kind != kept):
        yield "the kind of the task"
    for name, facts in run.data.items():
        found = getattr(task, name)
        if found is None or splits.fingerprint(found) != facts["fingerprint"]:
            yield f"the {name} split"


def artifact(name: str, file: Path, steps: Sequence[Step], target: Target) -> Artifact:
    """An exported file under the name it gets in the run folder."""
    return Artifact(
        path=f"{name}{file.suffix}",
        runtime=target.runtime,
        sha256=digest(file),
        size_bytes=size_bytes(file),
        recipe=recipe.to_toml(steps),
    )
