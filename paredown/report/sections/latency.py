"""How long single inferences take."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts
from paredown.report.words import axis_unit, quantity


def facts(run: Run) -> dict[str, Any] | None:
    """The distributions twice: as wide as the page, and for narrow screens."""
    samples = run.details.get("latency_samples_ms") or {}
    original, compressed = (
        charts.finite(samples.get(name) or []) for name in ("original", "compressed")
    )
    if not original and not compressed:
        return None
    unit, scale = axis_unit("latency", max(original + compressed))
    a, b = ([value / scale for value in values] for values in (original, compressed))
    drawn = [Markup(charts.latency(a, b, unit, width)) for width in (900, 460)]
    return {"charts": drawn, "beyond": _beyond(original, compressed)}


def _beyond(original: list[float], compressed: list[float]) -> str:
    """How many inferences the axis leaves out, and the slowest of them."""
    every = [*original, *compressed]
    edge = max(charts.slowest(values) for values in (original, compressed) if values)
    count = sum(value > edge for value in every)
    if not count:
        return "All of them are shown."
    lie = f"{count:,} of {len(every):,}, the slowest, {'lies' if count == 1 else 'lie'}"
    up_to = quantity(max(every), "latency")
    return f"{lie} beyond the right edge, {'at' if count == 1 else 'up to'} {up_to}."
