"""What values the weights have."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts

HISTOGRAMS = 24


def facts(run: Run) -> dict[str, Any] | None:
    given = run.details.get("histograms") or []
    drawn = [
        {"name": str(h["name"])[:200], "chart": Markup(_histogram(h))}
        for h in given
        if _drawable(h)
    ]
    return {"shown": drawn[:HISTOGRAMS], "count": len(given)} if drawn else None


def _drawable(h: dict[str, Any]) -> bool:
    edges, before, after = (charts.finite(h.get(key) or []) for key in ("edges", "before", "after"))
    return len(edges) - 1 == len(before) == len(after) > 0 and edges[-1] > edges[0]


def _histogram(h: dict[str, Any]) -> str:
    return charts.histogram(str(h["name"])[:200], h["edges"], h["before"], h["after"])
