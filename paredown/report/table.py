"""The top of the page: verdict, cards, goals, and the table of both files."""

from __future__ import annotations

from typing import Any

from paredown.core.goals import GoalCheck
from paredown.core.measurement import Measurement
from paredown.core.results import Run
from paredown.report.words import change, quantity, ratio, score, times

P99_SAMPLES = 459  # with fewer, the 99th percentile has no upper bound at 99% confidence
GOAL_NAMES = {"max_drop": "Score", "throughput": "Throughput", "latency": "Latency"}


def head(run: Run) -> dict[str, Any]:
    state = "met" if run.met else "missed"
    original, compressed = run.on_device.get("original"), run.on_device.get("compressed")
    return {
        "state": state,
        "cards": _cards(run, original, compressed),
        "goals": [_goal(run, check) for check in run.checks],
        "asked": [] if run.checks else _asked(run.goals, run.baseline.score_in_points),
        "rows": _rows(run, original, compressed),
        "wheres": _wheres(original, compressed),
        "p99_note": _p99_note(original, compressed),
    }


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
    difference = _difference(run, a, b)
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
    cards += [_ratio_card("Peak memory", "memory", a, b), _ratio_card("Energy", "energy", a, b)]
    return [card for card in cards if card["figure"]]


def _ratio_card(
    name: str, goal: str, a: Measurement, b: Measurement, run: Run | None = None
) -> dict[str, str]:
    before, after = a.quantity(goal), b.quantity(goal)
    figure, word, tone = ratio(goal, before, after)
    if run and run.comparison and run.comparison.speedup and figure:
        figure, word, tone = ratio(goal, run.comparison.speedup, 1.0)
    nbsp = "\u00a0"
    under = " → ".join(quantity(value, goal).replace(" ", nbsp) for value in (before, after))
    if goal == "energy" and b.energy_source != "measured":
        under += f", {b.energy_source}"
    return {"name": name, "figure": figure, "unit": word, "tone": tone, "under": under}


def comparison(run: Run) -> list[dict[str, Any]]:
    """The rows of the comparison table: name, figures (original, compressed), change, goal, met."""
    return _rows(run, run.on_device.get("original"), run.on_device.get("compressed"))


def _rows(run: Run, a: Measurement | None, b: Measurement | None) -> list[dict[str, Any]]:
    """The comparison table; a row that neither file has is left out, energy is always there."""
    if a is None and b is None:
        return []
    checks = {check.goal: check for check in run.checks}
    quantities = [
        ("Size on disk", "size", "size_bytes", "size"),
        ("Latency, median", "latency", "latency_ms_p50", "latency"),
        ("Latency, 90th percentile", "latency", "latency_ms_p90", ""),
        ("Latency, 99th percentile", "latency", "latency_ms_p99", ""),
        ("Throughput", "throughput", "throughput_per_s", "throughput"),
        ("Peak memory", "memory", "memory_bytes", "memory"),
        ("Energy per inference", "energy", "energy_mj", "energy"),
    ]
    rows = []
    for name, goal, field, asked in quantities:
        values = [getattr(m, field) if m else None for m in (a, b)]
        if values != [None, None] or goal == "energy":
            row = _row(run, name, goal, values, checks.get(asked))
            if goal == "energy":
                row["notes"] = [m.energy_source if m else "" for m in (a, b)]
            rows.append(row)
    packed = run.details.get("packed_bytes")
    if packed:
        values = [packed["original"], packed["compressed"]]
        rows.insert(1, _row(run, "Packed for delivery", "size", values, None))
    if any(m and m.score is not None for m in (a, b)):
        rows.insert(1, _score_row(run, a, b, checks.get("max_drop")))
    return rows


def _row(
    run: Run, name: str, goal: str, values: list[float | None], check: GoalCheck | None
) -> dict[str, Any]:
    number, word, tone = ratio(goal, values[0], values[1])
    interval = ""
    both = run.comparison
    if name == "Latency, median" and number and both and both.speedup:
        number, word, tone = ratio(goal, both.speedup, 1.0)
        if both.speedup_low and both.speedup_high:
            interval = f"{times(both.speedup_low)} to {times(both.speedup_high)} as fast"
    return {
        "name": name,
        "figures": [quantity(value, goal) for value in values],
        "notes": ["", ""],
        "change": f"{number} {word}".strip() or "–",
        "interval": interval,
        "tone": tone,
        "goal": _bound(run, check) if check and check.value is not None else "",
        "met": check.met if check else None,
    }


def _score_row(
    run: Run, a: Measurement | None, b: Measurement | None, check: GoalCheck | None
) -> dict[str, Any]:
    points = (b or a or run.baseline).score_in_points
    both = run.comparison
    interval = ""
    if both and both.score_difference_low is not None and both.score_difference_high is not None:
        low = change(both.score_difference_low, points, unit=False)
        interval = f"paired, {low} to {change(both.score_difference_high, points, unit=False)}"
    difference = _difference(run, a, b) if a and b else None
    some = b or a
    return {
        "name": f"Score on {some.examples:,} {some.split} examples" if some else "Score",
        "figures": [score(m.score, points) if m else "–" for m in (a, b)],
        "notes": [_interval(m) for m in (a, b)],
        "change": change(difference, points),
        "interval": interval,
        "tone": "",
        "goal": _bound(run, check) if check and check.value is not None else "",
        "met": check.met if check else None,
    }


def _difference(run: Run, a: Measurement, b: Measurement) -> float | None:
    """The paired difference where there is one, else that of the means."""
    if run.comparison and run.comparison.score_difference is not None:
        return run.comparison.score_difference
    return None if a.score is None or b.score is None else b.score - a.score


def _goal(run: Run, check: GoalCheck) -> dict[str, Any]:
    """One goal; the figure beside its sentence says how much of the bound is used."""
    name = GOAL_NAMES.get(check.goal, check.goal.capitalize())
    return {
        "name": name,
        "met": check.met,
        "sentence": check.sentence,
        "bound": _bound(run, check) if check.value is not None else "not measured",
    }


def _bound(run: Run, check: GoalCheck) -> str:
    if check.goal == "max_drop":
        return f"≥ {change(-check.bound, run.baseline.score_in_points)}"
    return f"{'≥' if check.goal == 'throughput' else '≤'} {quantity(check.bound, check.goal)}"


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
        elif limit is not None:
            texts.append(f"{goal}: {limit}")
    return texts


def _interval(m: Measurement | None) -> str:
    if m is None or m.score_low is None or m.score_high is None:
        return ""
    return f"{score(m.score_low, m.score_in_points)} to {score(m.score_high, m.score_in_points)}"


def _wheres(a: Measurement | None, b: Measurement | None) -> list[tuple[str, dict[str, str]]]:
    """Where each was measured; once when it was the same place."""
    if a and b and a.where == b.where:
        return [("Both measured on", a.where)] if a.where else []
    named = (("Original measured on", a), ("Compressed measured on", b))
    return [(name, m.where) for name, m in named if m and m.where]


def _p99_note(a: Measurement | None, b: Measurement | None) -> str:
    lacking = [m for m in (a, b) if m and m.latency_ms_p50 is not None and m.latency_ms_p99 is None]
    if not lacking:
        return ""
    fewest = min(m.latency_samples for m in lacking)
    return (
        f"The 99th percentile is left out where it rests on fewer than {P99_SAMPLES} samples "
        f"(here {fewest}): the slowest 1% would not be known well enough."
    )
