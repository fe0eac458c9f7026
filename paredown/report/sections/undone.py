"""The steps that were undone, each with the reason."""

from __future__ import annotations

from typing import Any

from paredown.core.results import Run


def facts(run: Run) -> dict[str, Any] | None:
    if not run.trials:
        return None
    undone = [(n, trial) for n, trial in enumerate(run.trials, 1) if not trial.kept]
    return {
        "steps": [{"number": n, "title": t.title, "decision": t.decision} for n, t in undone],
    }
