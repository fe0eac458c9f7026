"""Explain a finished run, and keep the explanation in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.files import write_atomically
from paredown.core.results import Run
from paredown.core.settings import check_arguments
from paredown.core.task import Task
from paredown.data import splits
from paredown.explain.explanation import Explanation, explain_file
from paredown.graph import machine
from paredown.graph.model import Model
from paredown.run.folder import changed_task
from paredown.run.ledger import MODEL, RUN, Ledger
from paredown.steps import recipe
from paredown.targets.artifact import check_kept

SECONDS = 120.0


def explain(folder: str | Path, task: Task, seconds: float = SECONDS) -> Explanation:
    """Say where a finished run's score went: by layer, by what restoring each wins, and why.

    The noise of each layer is that of the exported file on validation examples, beside the
    original; each layer is restored on the graph, with which the file agrees; and causes are named
    from the figures, each with the setting that mends it. The explanation is kept in the folder's
    ``run.json``, where `report` finds it.

    Args:
        folder: of the run.
        task: that of the run.
        seconds: about how long it may take; more time means more examples.

    Raises:
        UserError: no finished run there, one that compressed nothing, or data that are not the
            run's.
    """
    check_arguments(folder=(folder, str | Path), task=(task, Task), seconds=(seconds, float))
    folder = Path(folder)
    run, task = Run.load(folder), splits.prepared(task)
    stage, artifact = run.details.get("stage_sha256"), run.artifact
    if artifact is None or not stage:
        raise UserError(
            f"{folder}: nothing was compressed in this run, so there is no loss to explain."
            if stage == ""
            else f"{folder}: its run is of an older paredown; run it again in another folder."
        )
    changed = next(changed_task(run, task), None)
    if changed:
        raise UserError(f"{folder}: {changed} is not the one of the run.")
    with Ledger.reopen(folder) as ledger, machine.same_numbers(run.seed):
        original = _model(ledger, run.detail("model_sha256"))
        compressed = _model(ledger, stage)
        steps = recipe.from_toml(artifact.recipe, "the run's recipe")
        file, name = check_kept(artifact), artifact.runtime
        found = explain_file(original, compressed, file, name, task, steps, seconds)
        _keep(ledger, run, found)
    return found


def _model(ledger: Ledger, sha256: str) -> Model:
    path = ledger.get(sha256, MODEL)
    if path is None:
        raise UserError(f"{ledger.folder}: its stage {sha256[:12]} is gone; run it again.")
    return Model.load(path)


def _keep(ledger: Ledger, run: Run, found: Explanation) -> None:
    """The run with its explanation, as `compress` finds it again and as the report reads it."""
    changed = dataclasses.replace(run, details={**run.details, "explanation": found.to_json()})
    text = changed.to_json().encode()
    ledger.finish(run.detail("finished"), {"stage": ledger.put(text, RUN), "suffix": RUN})
    write_atomically(ledger.folder / "run.json", text)
    progress.say(f"Explanation in {ledger.folder / 'run.json'}")
