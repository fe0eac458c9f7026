"""The largest layers by their bytes."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from paredown.core.results import Run
from paredown.report import strips
from paredown.report.words import quantity

LAYERS = 40


def facts(run: Run) -> dict[str, Any] | None:
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
    before, after = (sum(x[key] for x in layers) for key in ("bytes_before", "bytes_after"))
    files = [run.on_device.get(name) for name in ("original", "compressed")]
    sizes = [file.size_bytes if file else None for file in files]
    beside = [
        size - held if size else None for size, held in zip(sizes, (before, after), strict=True)
    ]
    if all(each is not None and each > 0 for each in beside):
        rest_row = {"name": "All else in the file", "bytes_before": beside[0]}
        rows.append(_layer({**rest_row, "bytes_after": beside[1], "op": _parts(run, after)}, top))
        before, after = sizes
    ruler = Markup(strips.ruler(0, top, 0, lambda value: quantity(value, "size")))
    return {"rows": rows, "before": before, "after": after, "count": len(layers), "ruler": ruler}


def _parts(run: Run, layers: int) -> str:
    """What the rest of the compressed file is made of."""
    tensors = sum(((run.details.get("census") or {}).get("bytes_by_dtype") or {}).values())
    compressed = run.on_device["compressed"].size_bytes
    if not layers < tensors < compressed:
        return "biases, scales, the graph and names"
    held, graph = (quantity(size, "size") for size in (tensors - layers, compressed - tensors))
    return f"biases, scales {held} · graph, names {graph}"


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
        "bars": Markup(strips.pair(before, after, top, words)),
    }
