"""The score of each class."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts, strips
from paredown.report.words import change, score

CLASSES = 40


def facts(run: Run) -> dict[str, Any] | None:
    """Classes in their order, or those that changed most where there are too many."""
    given = run.details.get("classes") or []
    found = [x for x in given if len(charts.finite([x["before"], x["after"]])) == 2]
    if not found:
        return None
    measure = run.details.get("classes_by")
    points = run.baseline.score_in_points or bool(measure)  # a share of places, whatever the score
    chosen = found
    if len(found) > CLASSES:
        chosen = sorted(found, key=lambda x: -abs(x["after"] - x["before"]))[:CLASSES]
    values = [x[key] for x in chosen for key in ("before", "after")]
    low, high = charts.padded(values)
    if points:  # at least five points wide, so that a small change looks small
        air = max(0.0, 0.05 - (high - low)) / 2
        low, high = max(low - air, 0.0), min(high + air, 1.0)
    rows = [_class(x, low, high, points) for x in chosen]
    ruler = strips.ruler(low, high, 2, lambda v: f"{100 * v:g}%" if points else charts.number(v))
    return {"rows": rows, "count": len(found), "by": measure, "ruler": Markup(ruler)}


def _class(x: dict[str, Any], low: float, high: float, points: bool) -> dict[str, Any]:
    before, after = score(x["before"], points), score(x["after"], points)
    chart = strips.dumbbell(x["before"], x["after"], low, high, f"{before} before, {after} after")
    return {
        "name": str(x["name"])[:200],
        "examples": x.get("examples"),
        "before": before,
        "after": after,
        "change": change(x["after"] - x["before"], points, unit=False),
        "chart": Markup(chart),
    }
