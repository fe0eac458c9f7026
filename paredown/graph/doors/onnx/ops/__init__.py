"""ONNX's ops by name: each a small function of PyTorch's, or of arrays on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paredown.graph.doors.onnx.call import Call
from paredown.graph.doors.onnx.ops import (
    convolutions,
    elementwise,
    host,
    norms,
    picks,
    products,
    quantized,
    recurrent,
    reductions,
    resize,
    shapes,
    signals,
)

OPS: dict[str, Callable[[Call], Any]] = {
    **elementwise.TABLE,
    **shapes.TABLE,
    **picks.TABLE,
    **convolutions.TABLE,
    **products.TABLE,
    **norms.TABLE,
    **reductions.TABLE,
    **resize.TABLE,
    **recurrent.TABLE,
    **quantized.TABLE,
    **signals.TABLE,
}
HOST: dict[str, Callable[[Call], Any]] = host.TABLE
