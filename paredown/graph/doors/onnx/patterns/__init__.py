"""What exporters pull apart, put together again: one pattern, one small function."""

from __future__ import annotations

from paredown.graph.doors.onnx.patterns import (
    activations,
    attention,
    linear,
    norms,
    quantized,
    recurrent,
)
from paredown.graph.doors.onnx.patterns.match import Pattern

_FILES = (quantized, linear, recurrent, activations, norms, attention)
PATTERNS: dict[str, tuple[Pattern, ...]] = {
    op: tuple(pattern for file in _FILES for pattern in file.PATTERNS.get(op, ()))
    for op in {op for file in _FILES for op in file.PATTERNS}
}
