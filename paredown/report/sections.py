"""Layers, weights, classes, flipped examples, latencies and fused ops."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts
from paredown.report.words import change, quantity, score, short

LAYERS, HISTOGRAMS, CLASSES, FLIPS = 40, 24, 40, 36
PICTURE_BYTES = 400_000  # of all pictures together, so that the page stays under 1 MB
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+")


def layers(run: Run) -> dict[str, Any] | None:
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


def axis_unit(goal: str, top: float) -> tuple[str, float]:
    """The unit in which ``top`` reads best, and its size."""
    if goal == "latency":
        return ("ms", 1.0) if top >= 0.1 else ("µs", 1e-3)
    units = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
    return next((found for found in units if top >= found[1]), ("B", 1.0))


def histograms(run: Run) -> dict[str, Any] | None:
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


def classes(run: Run) -> dict[str, Any] | None:
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


def flips(run: Run) -> dict[str, Any] | None:
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


def latency(run: Run) -> list[Markup]:
    """The distributions twice: as wide as the page, and for narrow screens."""
    samples = run.details.get("latency_samples_ms") or {}
    original, compressed = (
        charts.finite(samples.get(name) or []) for name in ("original", "compressed")
    )
    if not original and not compressed:
        return []
    unit, scale = axis_unit("latency", max(original + compressed))
    a, b = ([value / scale for value in values] for values in (original, compressed))
    return [Markup(charts.latency(a, b, unit, width)) for width in (900, 460)]


def census(run: Run) -> dict[str, Any] | None:
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
    notes = [str(note) for note in census.get("notes") or []]
    return {"columns": columns, "kinds": kinds, "bar": bar, "notes": notes}


def _ranked(counts: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
