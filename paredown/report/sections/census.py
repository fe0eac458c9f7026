"""What the runtime runs, and in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import strips


def facts(run: Run) -> dict[str, Any] | None:
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
    bar = Markup(strips.stacked([size for _, size in kinds], "Bytes by type")) if kinds else ""
    same = run.details.get("instruction_sets")
    notes = [str(note) for note in [*(census.get("notes") or []), *([same] if same else [])]]
    return {"columns": columns, "kinds": kinds, "bar": bar, "notes": notes}


def _ranked(counts: dict[str, int]) -> Sequence[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
