"""The top of the page: verdict, cards and goals."""

from __future__ import annotations

from typing import Any

from paredown.core.goals import GoalCheck
from paredown.core.measurement import Measurement
from paredown.core.results import Run
from paredown.report.table import bound, changed, met, score_difference
from paredown.report.words import change, quantity, score

GOAL_NAMES = {"max_drop": "Score", "throughput": "Throughput", "latency": "Latency"}


def facts(run: Run) -> dict[str, Any]:
    original, compressed = run.on_device.get("original"), run.on_device.get("compressed")
    return {
        "title": _title(run),
        "banner": "missed" if run.outcome == "not proven" else run.outcome,
        "in_reach": run.details.get("in_reach"),
        "cards": _cards(run, original, compressed),
        "goals": [_goal(run, check) for check in run.checks],
        "asked": [] if run.checks else _asked(run.goals, run.baseline.score_in_points),
    }


def _title(run: Run) -> str:
    if run.outcome == "open":
        if run.details.get("useless"):
            return "Goals met by a file of no use" if run.checks else "A file of no use"
        return "Met, not proven"
    return f"Goals {run.outcome}"


def _cards(run: Run, a: Measurement | None, b: Measurement | None) -> list[dict[str, str]]:
    """The big figures: ratios where both files were measured, else what is known of one."""
    if a is None or b is None:
        one = b or a or run.baseline
        name = "of the compressed" if b else "of the original"
        figures = [("Size", quantity(one.size_bytes, "size"))]
        figures.append(("Median latency", quantity(one.latency_ms_p50, "latency")))
        figures.append(("Score", score(one.score, one.score_in_points)))
        return [
            {"name": n, "figure": f, "unit": "", "tone": "", "under": name}
            for n, f in figures
            if f != "–"
        ]
    cards = [_ratio_card("Size", "size", a, b), _ratio_card("Speed", "latency", a, b, run)]
    difference = score_difference(run, a, b)
    if difference is not None and a.score is not None and b.score is not None:
        points = b.score_in_points
        cards.append(
            {
                "name": "Score",
                "figure": change(difference, points, unit=False),
                "unit": "points" if points else "",
                "tone": "",
                "under": f"{score(a.score, points)} → {score(b.score, points)}",
            }
        )
    cards += [_ratio_card("Memory", "memory", a, b), _ratio_card("Energy", "energy", a, b)]
    return [card for card in cards if card["figure"]]


def _ratio_card(
    name: str, goal: str, a: Measurement, b: Measurement, run: Run | None = None
) -> dict[str, str]:
    asked = "memory_model" if goal == "memory" and b.quantity("memory_model") else goal
    before, after = a.quantity(asked), b.quantity(asked)
    figure, word, tone = changed(run.comparison if run else None, goal, (before, after))
    if word == "speed-up":  # too long for a figure
        figure, word = "even", f"{figure} {word}"
    nbsp = "\u00a0"
    under = " → ".join(quantity(value, goal).replace(" ", nbsp) for value in (before, after))
    if asked == "memory_model":
        under += f" for the model, {quantity(b.memory_bytes, goal)} with the runtime"
    if goal == "energy" and b.energy_source != "measured":
        under += f", {b.energy_source}"
    return {"name": name, "figure": figure, "unit": word, "tone": tone, "under": under}


def _goal(run: Run, check: GoalCheck) -> dict[str, Any]:
    """One goal; the figure beside its sentence says how much of the bound is used."""
    name = GOAL_NAMES.get(check.goal, check.goal.capitalize())
    return {
        "name": name,
        "state": met(check),
        "sentence": check.sentence,
        "bound": bound(run, check) if check.value is not None else "not measured",
    }


def _asked(goals: dict[str, Any], points: bool) -> list[str]:
    """The goals as asked, for a run that ended before they could be checked."""
    texts = []
    for goal, limit in goals.items():
        if goal == "max_drop" and limit is not None:
            texts.append(f"score: at most {100 * limit:g}{' points' if points else '%'} lower")
        elif isinstance(limit, dict) and limit.get("relative"):
            texts.append(f"{goal}: {limit['value']:g}× of the original")
        elif isinstance(limit, dict):
            texts.append(f"{goal}: {quantity(limit['value'], goal)}")
        elif limit is not None and goal != "proof":
            texts.append(f"{goal}: {limit}")
    return texts
