"""The steps that are not in the artifact, each with the reason."""

from __future__ import annotations

from typing import Any

from paredown.core.results import Run, Trial


def facts(run: Run) -> dict[str, Any] | None:
    if not run.trials:
        return None
    left = [(n, trial) for n, trial in enumerate(run.trials, 1) if not trial.shipped]
    return {"steps": [{"number": n, "title": t.title, "decision": _why(t)} for n, t in left]}


def _why(trial: Trial) -> str:
    if not trial.kept:
        return trial.decision
    return (
        f"Kept in its recipe, {trial.recipe}, and left: another file that was measured comes "
        f"nearer to the goals. {trial.decision}"
    )
