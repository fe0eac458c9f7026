"""A run's artifact, made again from its recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.results import Artifact, Run
from paredown.core.settings import check_arguments
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.graph import machine, store
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.run.folder import changed_task
from paredown.run.identity import TRAINED
from paredown.steps import recipe
from paredown.steps.step import Setting
from paredown.targets.artifact import check_kept, digest
from paredown.targets.runtimes import runtime


def replay(
    folder: str | Path, model: nn.Module | Model | str | Path, task: Task
) -> tuple[Artifact, str]:
    """Make a run's artifact again from its recipe: the artifact as kept, and the new SHA-256.

    Raises:
        UserError: the folder holds no finished run, or its artifact, the model or the data are not
            those of the run; the artifact's two SHA-256 are given.
    """
    check_arguments(model=(model, nn.Module | Model | str | Path), task=(task, Task))
    run, task = Run.load(folder), splits.prepared(task)
    if run.artifact is None:
        raise UserError(f"{folder}: its run has no artifact.")
    check_kept(run.artifact)
    captured = capture(model, task.example, task.dynamic)
    changed = next(_changed(run, captured, task), None)
    if changed:
        hint = f" {TRAINED}" if changed == "the model" else ""
        raise UserError(f"{folder}: {changed} is not the one of the run.{hint}")
    setting = Setting(original=captured, target=Target(**run.target))
    with tempfile.TemporaryDirectory() as made:
        for step in recipe.from_toml(run.artifact.recipe, "the run's recipe"):
            progress.say(f"  {recipe.line(step)}")
            threads = machine.threads(run.details.get("threads"))  # as many round sums the same
            with machine.same_numbers(run.seed), threads:
                applied = recipe.apply_step(captured, step, task, setting)
            applied.save(Path(made) / "replay.safetensors")  # the stored form, as in the run
            captured = Model.load(Path(made) / "replay.safetensors")
        chosen = runtime(run.artifact.runtime)
        path = chosen.lower(captured, Path(made) / f"replay{chosen.SUFFIX}")
        return run.artifact, digest(path)


def _changed(run: Run, model: Model, task: Task) -> Iterator[str]:
    """What is not as it was in the run."""
    if store.digest(model) != run.detail("model_sha256"):
        yield "the model"
    steps = recipe.from_toml(run.artifact.recipe if run.artifact else "", "the run's recipe")
    try:
        now = recipe.contents(steps, task)
    except UserError as error:
        raise UserError(f"the run's recipe: {error}") from error
    for name, sha256 in (run.details.get("files") or {}).items():
        if now.get(name) != sha256:
            yield name
    yield from changed_task(run, task)
