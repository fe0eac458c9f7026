"""Score against size and latency, step by step."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.results import Run, Trial
from paredown.report import charts
from paredown.report.words import axis_unit, change, quantity, score


def facts(run: Run) -> dict[str, Any] | None:
    if not run.trials:
        return None
    points = run.baseline.score_in_points
    steps = [_step(index, trial, points) for index, trial in enumerate(run.trials, 1)]
    return {
        "baseline": _came(run.baseline, points),
        "steps": steps,
        "charts": [Markup(chart) for goal in ("size", "latency") if (chart := _against(run, goal))],
    }


def _step(index: int, trial: Trial, points: bool) -> dict[str, Any]:
    difference = trial.comparison.score_difference if trial.comparison else None
    return {
        "number": index,
        "title": trial.title,
        "lines": trial.steps,
        "reason": trial.reason,
        "expected": trial.expected,
        "state": state(trial),
        "recipe": trial.recipe,
        "decision": trial.decision,
        "came": _came(trial.measurement, points),
        "difference": change(difference, points) if difference is not None else "",
        "seconds": f"{trial.seconds / 60:.1f} min"
        if trial.seconds >= 90
        else f"{trial.seconds:.3g} s",
    }


def state(trial: Trial) -> str:
    """Whether a step is in the artifact ("shipped"), was only kept in its own recipe, or undone."""
    return "shipped" if trial.shipped else "kept" if trial.kept else "undone"


def _came(m: Measurement | None, points: bool) -> list[tuple[str, str]]:
    if m is None:
        return []
    came = [
        ("size", quantity(m.size_bytes, "size")),
        ("latency", quantity(m.latency_ms_p50, "latency")),
        ("score", score(m.score, points)),
    ]
    return [(name, value) for name, value in came if value != "–"]


def _against(run: Run, goal: str) -> str:
    """Score against size or latency; empty where fewer than two steps have both."""
    found = [("0", "shipped", "original", run.baseline, "")]
    found += [
        (str(n), state(trial), trial.title, trial.measurement, str(trial.after))
        for n, trial in enumerate(run.trials, 1)
        if trial.measurement
    ]
    costs = charts.finite(m.quantity(goal) for _, _, _, m, _ in found)
    unit, scale = axis_unit(goal, max(costs, default=1.0))
    percent = 100.0 if run.baseline.score_in_points else 1.0
    drawn = [
        charts.Point(cost / scale, percent * m.score, label, kind, f"{label}: {title}", after)
        for label, kind, title, m, after in found
        if (cost := m.quantity(goal)) is not None and m.score is not None
        if math.isfinite(cost) and math.isfinite(m.score)
    ]
    if len(drawn) < 2:
        return ""
    bounds = {c.goal: c.bound for c in run.checks if c.value is not None}
    cost_axis = charts.Axis(f"{goal}, {unit}")
    if goal in bounds:
        words = f"goal ≤ {quantity(bounds[goal], goal)}"
        cost_axis = charts.Axis(cost_axis.label, bounds[goal] / scale, words)
    score_axis = charts.Axis("score, %" if percent == 100 else "score")
    asked = Goals(run.goals.get("max_drop"))
    allowed = asked.allowed_drop(run.baseline)  # of this split's score, not of the test's
    if "max_drop" in bounds and run.baseline.score is not None and allowed is not None:
        floor = run.baseline.score - allowed
        words = f"goal ≥ {score(floor, run.baseline.score_in_points)}"
        score_axis = charts.Axis(score_axis.label, percent * floor, words)
    return charts.trajectory(drawn, cost_axis, score_axis)
