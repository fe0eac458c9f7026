"""Notes, and what it takes to repeat the run."""

from __future__ import annotations

from typing import Any

from paredown.core.results import Run
from paredown.core.task import SPLITS


def facts(run: Run) -> dict[str, Any]:
    return {
        "notes": run.details.get("notes") or [],
        "data": sorted(run.data.items(), key=_split_order),
        "reproduce": "\n".join(run.details.get("reproduce") or []),
    }


def _split_order(item: tuple[str, Any]) -> tuple[int, str]:
    return (SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)), item[0]
