"""Run -> one self-contained HTML page: no network, no script, nothing outside the file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from paredown.files import write_atomically
from paredown.report import charts
from paredown.types import SPLITS, GoalCheck, Measurement, Run, Trial, human

LAYERS, HISTOGRAMS, CLASSES, FLIPS = 40, 24, 40, 36
PICTURE_BYTES = 400_000  # of all pictures together, so that the page stays under 1 MB
P99_SAMPLES = 459  # with fewer, the 99th percentile has no upper bound at 99% confidence
GOAL_NAMES = {"max_drop": "Score", "throughput": "Throughput", "latency": "Latency"}
WORDS = {
    "size": ("smaller", "larger"),
    "memory": ("less", "more"),
    "latency": ("faster", "slower"),
    "throughput": ("more", "less"),
    "energy": ("less", "more"),
}
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


def report(run: Run, path: Path) -> Path:
    """Write the page of ``run`` at ``path``, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, render(run).encode())
    return path


def render(run: Run) -> str:
    """The page as text; it depends on nothing but ``run``."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"human": quantity, "short": short}
    source = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return environment.from_string(source).render(
        run=run,
        **_head(run),
        **_trajectory(run),
        layers=_layers(run),
        histograms=_histograms(run),
        classes=_classes(run),
        flips=_flips(run),
        latency=_latency(run),
        census=_census(run),
        notes=run.details.get("notes") or [],
        data=sorted(run.data.items(), key=_split_order),
        reproduce="\n".join(run.details.get("reproduce") or []),
    )


def _split_order(item: tuple[str, Any]) -> tuple[int, str]:
    return (SPLITS.index(item[0]) if item[0] in SPLITS else len(SPLITS)), item[0]


def quantity(value: float | None, goal: str) -> str:
    """A figure with its unit and a true minus sign, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return human(goal, value).replace(" us", " µs").replace("-", "−")


def short(name: object, length: int = 56) -> str:
    """A long name with its middle left out.

    Example:
        >>> short("encoder.layers.11.attention", 15)
        'encoder…tention'
    """
    words = str(name)
    half = (length - 1) // 2
    return words if len(words) <= length else f"{words[:half]}…{words[-half:]}"


def score(value: float | None, points: bool) -> str:
    """A score: per cent where it lies in [0, 1].

    Example:
        >>> score(0.9124, True), score(-31.25, False)
        ('91.24%', '−31.25')
    """
    if value is None:
        return "–"
    return (f"{100 * value:.2f}%" if points else f"{value:.4g}").replace("-", "−")


def change(value: float | None, points: bool, unit: bool = True) -> str:
    """A signed difference of scores, in points where they lie in [0, 1].

    Example:
        >>> change(-0.0042, True), change(0.5, False), change(0.0, True, unit=False)
        ('−0.42 points', '+0.5', '0.00')
    """
    if value is None:
        return "–"
    words = f"{100 * value:+.2f}" if points else f"{value:+.3g}"
    if not float(words):
        words = words.lstrip("+-")
    return words.replace("-", "−") + (" points" if points and unit else "")


def times(ratio: float) -> str:
    """A ratio with three digits.

    Example:
        >>> times(1.3), times(12.04), times(148.2)
        ('1.30×', '12.0×', '148×')
    """
    digits = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{digits}f}×"


def ratio(goal: str, before: float | None, after: float | None) -> tuple[str, str, str]:
    """How many times better or worse, as (number, word, "better" | "worse" | "").

    Example:
        >>> ratio("size", 1000, 250), ratio("latency", 1.0, 2.0), ratio("size", None, 1.0)
        (('4.00×', 'smaller', 'better'), ('2.00×', 'slower', 'worse'), ('', '', ''))
    """
    if not before or not after or before < 0 or after < 0:
        return "", "", ""
    gain = after / before if goal == "throughput" else before / after
    if 0.995 < gain < 1.005:
        return "1×", "the same", ""
    better, worse = WORDS[goal]
    return (times(gain), better, "better") if gain > 1 else (times(1 / gain), worse, "worse")


def _head(run: Run) -> dict[str, Any]:
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


def _trajectory(run: Run) -> dict[str, Any]:
    points = run.baseline.score_in_points
    steps = [_step(index, trial, points) for index, trial in enumerate(run.trials, 1)]
    return {
        "baseline": _came(run.baseline, points),
        "steps": steps,
        "undone": [step for step in steps if not step["kept"]],
        "trajectories": [
            Markup(chart) for goal in ("size", "latency") if (chart := _against(run, goal))
        ],
    }


def _step(index: int, trial: Trial, points: bool) -> dict[str, Any]:
    difference = trial.comparison.score_difference if trial.comparison else None
    return {
        "number": index,
        "title": trial.title,
        "lines": trial.steps,
        "reason": trial.reason,
        "expected": trial.expected,
        "kept": trial.kept,
        "decision": trial.decision,
        "came": _came(trial.measurement, points),
        "difference": change(difference, points) if difference is not None else "",
        "seconds": f"{trial.seconds / 60:.1f} min"
        if trial.seconds >= 90
        else f"{trial.seconds:.3g} s",
    }


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
    found = [("0", True, "original", run.baseline)]
    found += [
        (str(n), trial.kept, trial.title, trial.measurement)
        for n, trial in enumerate(run.trials, 1)
        if trial.measurement
    ]
    costs = charts.finite(m.quantity(goal) for _, _, _, m in found)
    unit, scale = _unit(goal, max(costs, default=1.0))
    percent = 100.0 if run.baseline.score_in_points else 1.0
    drawn = [
        charts.Point(cost / scale, percent * m.score, label, kept, f"{label}: {title}")
        for label, kept, title, m in found
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
    if "max_drop" in bounds and run.baseline.score is not None:
        floor = run.baseline.score - bounds["max_drop"]
        words = f"goal ≥ {score(floor, run.baseline.score_in_points)}"
        score_axis = charts.Axis(score_axis.label, percent * floor, words)
    return charts.trajectory(drawn, cost_axis, score_axis)


def _unit(goal: str, top: float) -> tuple[str, float]:
    """The unit in which ``top`` reads best, and its size."""
    if goal == "latency":
        return ("ms", 1.0) if top >= 0.1 else ("µs", 1e-3)
    units = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
    return next((found for found in units if top >= found[1]), ("B", 1.0))


def _layers(run: Run) -> dict[str, Any] | None:
    """The largest layers as bars; the rest summed in one row."""
    layers = run.details.get("layers") or []
    if not layers:
        return None
    ordered = sorted(layers, key=lambda layer: -layer["bytes_before"])
    top = max(max(x["bytes_before"], x["bytes_after"]) for x in layers)
    rows = [_layer(layer, top) for layer in ordered[:LAYERS]]
    rest = ordered[LAYERS:]
    if rest:
        total = {key: sum(x[key] for x in rest) for key in ("bytes_before", "bytes_after")}
        rows.append(_layer({"name": f"{len(rest):,} more layers", **total}, top))
    before = sum(x["bytes_before"] for x in layers)
    after = sum(x["bytes_after"] for x in layers)
    ruler = Markup(charts.ruler(0, top, 0, lambda value: quantity(value, "size")))
    return {"rows": rows, "before": before, "after": after, "count": len(layers), "ruler": ruler}


def _layer(layer: dict[str, Any], top: float) -> dict[str, Any]:
    before, after = layer["bytes_before"], layer["bytes_after"]
    types = [str(layer.get(key) or "") for key in ("dtype_before", "dtype_after")]
    known = [name for name in dict.fromkeys(types) if name]
    shape = " × ".join(str(n) for n in layer.get("shape") or [])
    words = f"{quantity(before, 'size')} before, {quantity(after, 'size')} after"
    return {
        "name": str(layer["name"])[:200],
        "facts": " · ".join(x for x in (layer.get("op") or "", shape, " → ".join(known)) if x),
        "before": before,
        "after": after,
        "bars": Markup(charts.pair(before, after, top, words)),
    }


def _histograms(run: Run) -> dict[str, Any] | None:
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


def _classes(run: Run) -> dict[str, Any] | None:
    """Classes in their order, or those that changed most where there are too many."""
    given = run.details.get("classes") or []
    found = [x for x in given if len(charts.finite([x["before"], x["after"]])) == 2]
    if not found:
        return None
    points = run.baseline.score_in_points
    chosen = found
    if len(found) > CLASSES:
        chosen = sorted(found, key=lambda x: -abs(x["after"] - x["before"]))[:CLASSES]
    values = [x[key] for x in chosen for key in ("before", "after")]
    low, high = charts.padded(values)
    if points:  # at least five points wide, so that a small change looks small
        air = max(0.0, 0.05 - (high - low)) / 2
        low, high = max(low - air, 0.0), min(high + air, 1.0)
    rows = [_class(x, low, high, points) for x in chosen]
    ruler = charts.ruler(low, high, 2, lambda v: f"{100 * v:g}%" if points else charts.number(v))
    return {"rows": rows, "count": len(found), "ruler": Markup(ruler)}


def _class(x: dict[str, Any], low: float, high: float, points: bool) -> dict[str, Any]:
    before, after = score(x["before"], points), score(x["after"], points)
    chart = charts.dumbbell(x["before"], x["after"], low, high, f"{before} before, {after} after")
    return {
        "name": str(x["name"])[:200],
        "examples": x.get("examples"),
        "before": before,
        "after": after,
        "change": change(x["after"] - x["before"], points, unit=False),
        "chart": Markup(chart),
    }


def _flips(run: Run) -> dict[str, Any] | None:
    given = run.details.get("flips") or []
    counts = run.details.get("flip_counts") or {}
    right = [f for f in given if f["after"] == f["target"]]
    wrong = [f for f in given if f["after"] != f["target"]]
    if not given and not counts:
        return None
    budget = [PICTURE_BYTES]
    groups = []
    for name, key, members in (
        ("Now wrong", "now_wrong", wrong),
        ("Now right", "now_right", right),
    ):
        shown = [_flip(member, budget) for member in members[:FLIPS]]
        pictures = [flip for flip in shown if flip["picture"]]
        count = counts.get(key, len(members))
        groups.append(
            {
                "name": name,
                "key": key,
                "count": count,
                "tiles": pictures,
                "plain": [flip for flip in shown if not flip["picture"]],
                "more": max(0, count - len(shown)),
            }
        )
    return {"groups": groups, "examples": counts.get("examples")}


def _flip(flip: dict[str, Any], budget: list[int]) -> dict[str, str | None]:
    """A flip with its picture, if that is one (never an address) and there is room for it."""
    picture = flip.get("picture") or ""
    flip = {key: short(flip[key]) for key in ("index", "target", "before", "after")}
    if not _PICTURE.fullmatch(picture) or len(picture) > budget[0]:
        return {**flip, "picture": None}
    budget[0] -= len(picture)
    return {**flip, "picture": picture}


def _latency(run: Run) -> list[Markup]:
    """The distributions twice: as wide as the page, and for narrow screens."""
    samples = run.details.get("latency_samples_ms") or {}
    original, compressed = (
        charts.finite(samples.get(name) or []) for name in ("original", "compressed")
    )
    if not original and not compressed:
        return []
    unit, scale = _unit("latency", max(original + compressed))
    a, b = ([value / scale for value in values] for values in (original, compressed))
    return [Markup(charts.latency(a, b, unit, width)) for width in (900, 460)]


def _census(run: Run) -> dict[str, Any] | None:
    census = run.details.get("census") or {}
    names = (("integer_ops", "Integer kernels"), ("float_ops", "Left in float"))
    columns = [
        {"name": name, "ops": _ranked(census[key]), "total": sum(census[key].values())}
        for key, name in names
        if census.get(key)
    ]
    kinds = _ranked(census.get("bytes_by_dtype") or {})
    if not columns and not kinds:
        return None
    bar = Markup(charts.stacked([size for _, size in kinds], "Bytes by type")) if kinds else ""
    return {"columns": columns, "kinds": kinds, "bar": bar}


def _ranked(counts: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def comparison(run: Run) -> list[dict[str, Any]]:
    """The rows of the comparison table: name, figures (original, compressed), change, goal, met."""
    return _rows(run, run.on_device.get("original"), run.on_device.get("compressed"))
