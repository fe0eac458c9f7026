"""How long single inferences take."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import charts
from paredown.report.words import axis_unit


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
    return {"charts": [Markup(charts.latency(a, b, unit, width)) for width in (900, 460)]}
