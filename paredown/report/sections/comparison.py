"""Both files beside each other, and where they were measured."""

from __future__ import annotations

from typing import Any

from paredown.core.measurement import Measurement
from paredown.core.results import Run
from paredown.report.table import comparison

P99_SAMPLES = 459  # with fewer, the 99th percentile has no upper bound at 99% confidence


def facts(run: Run) -> dict[str, Any] | None:
    rows = comparison(run)
    if not rows:
        return None
    original, compressed = run.on_device.get("original"), run.on_device.get("compressed")
    return {
        "rows": rows,
        "wheres": _wheres(original, compressed),
        "p99_note": _p99_note(original, compressed),
    }


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
