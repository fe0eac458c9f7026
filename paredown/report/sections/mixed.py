"""Which layers stay in float: score against bytes, and what each layer costs."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts
from paredown.report.words import axis_unit, change, quantity, score

LAYERS = 24


def facts(run: Run) -> dict[str, Any] | None:
    """The curve of the last kept step that chose layers by their cost, or None."""
    kept = [trial for trial in run.trials if trial.kept]
    found = [each for trial in kept for each in trial.findings if each["kind"] == "mixed precision"]
    if not found:
        return None
    told, points = found[-1], run.baseline.score_in_points
    floats = sum(bool(row[4]) for row in told["layers"])
    return {
        "summary": f"{floats} of {len(told['layers'])} layers stay in float, so that the score "
        f"falls by at most {score(told['allowed'], points)}.".replace("%", " points"),
        "chart": Markup(_curve(told, points)),
        "rows": [_row(row, points) for row in told["layers"][:LAYERS]],
        "more": max(0, len(told["layers"]) - LAYERS),
    }


def _curve(told: dict[str, Any], points: bool) -> str:
    percent = 100.0 if points else 1.0
    unit, scale = axis_unit("size", max(size for _, size, _ in told["tried"]))
    drawn: list[charts.Point] = []
    for floats, size, value in told["tried"]:
        at, words = (size / scale, percent * value), f"{floats} layers in float"
        before = drawn[-1].label if drawn else ""
        drawn.append(charts.Point(*at, str(floats), "shipped", words, before))
    floor = told["original"] - told["allowed"]
    axis = charts.Axis(
        "score, %" if points else "score", percent * floor, f"allowed ≥ {score(floor, points)}"
    )
    return charts.trajectory(drawn, charts.Axis(f"weights, {unit}"), axis)


def _row(row: list[Any], points: bool) -> dict[str, str]:
    name, drop, noise, saved, in_float = row
    return {
        "name": str(name)[:200],
        "drop": change(-drop, points),
        "noise": f"{-10 * math.log10(noise):.0f} dB" if noise > 0 else "exact",
        "saves": quantity(saved, "size"),
        "now": "float" if in_float else "integers",
    }
