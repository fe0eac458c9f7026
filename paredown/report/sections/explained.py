"""Where the score went: the noise of each layer, what restoring it wins, and the causes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.explain.cause import KINDS
from paredown.explain.explanation import Explanation
from paredown.explain.words import (
    cut_too,
    decibels,
    names,
    percent,
    ranking_words,
    summary,
    tried,
    won,
)
from paredown.report import charts, strips
from paredown.report.words import short

RESTORED, CAUSES, NAMED = 8, 12, 3
LEAST_DB, MOST_DB = 30.0, 80.0  # of the chart's height: a difference above is none to worry about
# key of a layer's row -> (class of its dots and line, what it is)
SERIES = {
    "snr_db": ("after", "so far, beside the original"),
    "rounding_db": ("before", "of rounding so far"),
    "own_db": ("own", "of the layer alone, given exact inputs"),
}


def facts(run: Run) -> dict[str, Any] | None:
    """The section's parts; None where nothing was explained."""
    found = run.details.get("explanation")
    if not found:
        return None
    if "problem" in found:
        return {"problem": str(found["problem"])}
    told = Explanation(**found)
    points = run.baseline.score_in_points
    series = _series(told)
    return {
        "problem": "",
        "summary": summary(told),
        "series": [SERIES[key] for key in series],
        "charts": [Markup(_chart(told.layers, series, width)) for width in (900, 460)],
        "restored": _restored(told, points) if told.ranking else None,
        "ranking": ranking_words(told.ranking, points) if told.ranking else "",
        "causes": [_cause(cause) for cause in told.causes[:CAUSES]],
        "more": max(0, len(told.causes) - CAUSES),
    }


def _series(told: Explanation) -> list[str]:
    """What is drawn: rounding on its own where more than rounding was done."""
    found = ["snr_db", *(["rounding_db"] if cut_too(told) else []), "own_db"]
    rounds = any(row["bits"] for row in told.layers)
    return [
        key
        for key in found
        if any(row[key] is not None for row in told.layers) and (rounds or key == "snr_db")
    ]


def _chart(layers: Sequence[dict[str, Any]], series: Sequence[str], width: int) -> str:
    """Signal over error along the depth: lines so far, dots for each layer alone."""
    shown = [row for row in layers if any(row[key] is not None for key in series)]
    values = charts.finite(row[key] for row in shown for key in series)
    low, high = min([0.0, *values]), min(MOST_DB, max([LEAST_DB, *values]) * 1.06)
    x = charts.Scale(0, max(1, len(shown) - 1), 44, width - 44)
    y = charts.Scale(max(low, -20.0), high, 250, 40)
    parts = charts.levels(y, "signal over error, dB", x)
    parts += [
        charts.text(x.end + 8, y(level) + 4, percent(level).replace("%", "\u2009%"))
        for level in (0, 20, 40, 60)
        if y.low <= level <= y.high
    ]
    parts.append(charts.text(width, 12, "error", "end", "name"))
    parts += _ends(shown, x, width)
    for key in series:
        parts += _drawn(key, shown, x, y)
    if width > 800:
        parts += _named(shown, series, x, y)
    return charts.svg(width, 292, "Signal over error by layer", parts)


def _ends(shown: Sequence[dict[str, Any]], x: charts.Scale, width: int) -> list[str]:
    """The names of the first and the last layer under the axis."""
    if not shown:
        return []
    length = width // 18
    first, last = (short(row["name"], length) for row in (shown[0], shown[-1]))
    named = [charts.text(x.start, 272, first), charts.text(x.end, 272, last, "end")]
    return named[: len(shown)]


def _drawn(
    key: str, shown: Sequence[dict[str, Any]], x: charts.Scale, y: charts.Scale
) -> list[str]:
    style, _ = SERIES[key]
    points = [
        (x(place), y(min(max(row[key], y.low), y.high)), row)
        for place, row in enumerate(shown)
        if row[key] is not None
    ]
    parts = []
    if key != "own_db":
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
        parts.append(f'<polyline points="{path}" class="way {style}line"/>')
    radius = 4 if len(points) <= 80 else 2
    for a, b, row in points:
        title = f"{escape(str(row['name'])[:200])}: {decibels(row[key])} dB"
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{radius}" class="dot {style}dot">'
            f"<title>{title}</title></circle>"
        )
    return parts


def _named(
    shown: Sequence[dict[str, Any]], series: Sequence[str], x: charts.Scale, y: charts.Scale
) -> list[str]:
    """The names of the noisiest layers, beside their dots and clear of all others."""

    def at(place: int, db: float) -> tuple[float, float]:
        return x(place), y(min(max(db, y.low), y.high))

    dots = [
        at(n, row[key]) for key in series for n, row in enumerate(shown) if row[key] is not None
    ]
    taken = [charts.around(a, b, 5) for a, b in dots]
    key = series[-1]
    placed = [(row[key], n, row) for n, row in enumerate(shown) if row[key] is not None]
    return [
        charts.place(*at(n, db), short(row["name"], 24), taken, (x.start, 30, x.end, 248))
        for db, n, row in sorted(placed, key=lambda each: each[0])[:NAMED]
    ]


def _restored(told: Explanation, points: bool) -> dict[str, Any]:
    """The layers that win most, each with its bar."""
    assert told.ranking is not None
    every = told.ranking["restored"]
    rows = [row for n, row in enumerate(every) if n < 3 or (row["won_db"] or 0.0) >= 0.05]
    rows = rows[:RESTORED]
    gains = charts.finite(row["won_db"] for row in rows)
    low, high = min([0.0, *gains]), max([1.0, *gains])
    return {
        "more": len(every) - len(rows),
        "rows": [_restored_row(row, told.ranking["compressed"], low, high, points) for row in rows],
        "ruler": Markup(strips.ruler(low, high, 0, lambda value: f"{charts.number(value)} dB")),
    }


def _restored_row(
    row: dict[str, Any], now: dict[str, Any], low: float, high: float, points: bool
) -> dict[str, Any]:
    outputs, score, loss, cost = (word.replace("-", "−") for word in won(row, now, points))
    bar = strips.gain(row["won_db"] or 0.0, low, high, f"{outputs} won")
    changed = {"score": score, "loss": loss}
    return {
        "name": names(row["layers"], 2)[:200],
        "facts": ", ".join(f"{key} {word}" for key, word in changed.items() if word != "–"),
        "outputs": outputs,
        "bytes": cost,
        "chart": Markup(bar),
    }


def _cause(cause: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": KINDS.get(cause["kind"], str(cause["kind"])).capitalize(),
        "layers": names([str(name)[:200] for name in cause["layers"]]),
        "words": cause["words"],
        "remedy": cause["remedy"],
        "tried": tried(cause),
    }
