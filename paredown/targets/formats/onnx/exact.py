"""The exporter's rewrite rules, kept to the numbers that they name.

A rule such as ``x + 0`` -> ``x`` takes any constant within 1e-8 or a hundred-thousandth for its
own: ``h / (h.norm() + 1e-8)`` would lose what keeps it from dividing by zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir


@contextlib.contextmanager
def exact_rules() -> Iterator[None]:
    """Let rules of onnxscript's rewriter match a number only where it is the one they name."""
    from onnxscript.rewriter import _matcher

    # No setting reaches the tolerances of the exporter's own rules.
    matcher: Any = _matcher.SimplePatternMatcher
    within_tolerance = matcher._match_constant

    def match(self: Any, named: Any, value: ir.Value) -> bool:
        if not within_tolerance(self, named, value):
            return False
        return _equal(named.value, value) or self.fail(f"{value.name} is not {named.value}")

    matcher._match_constant = match
    try:
        yield
    finally:
        matcher._match_constant = within_tolerance


def _equal(named: Any, value: ir.Value) -> bool:
    """Whether a constant is the number that a rule names, rounded as the constant is."""
    assert value.const_value is not None
    found = value.const_value.numpy()
    return np.array_equal(found, np.asarray(named).astype(found.dtype))
