"""The exporter's rewrite rules, kept to the numbers that they name and to what they can match, and
its ops, read once.

A rule such as ``x + 0`` -> ``x`` takes any constant within 1e-8 or a hundred-thousandth for its
own: ``h / (h.norm() + 1e-8)`` would lose what keeps it from dividing by zero. And a rule with
several outputs looks the whole graph over for every node, whatever the node is, which takes longer
than all else once a model is some dozen blocks deep.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir


@contextlib.contextmanager
def exact_rules() -> Iterator[None]:
    """Let rules of onnxscript's rewriter match a number only where it is the one they name, and
    look further only from a node that is of their first op."""
    from onnxscript.rewriter import MatchResult, _matcher

    # No setting reaches the tolerances of the exporter's own rules, or their search.
    matcher: Any = _matcher.SimplePatternMatcher
    within_tolerance, everywhere = matcher._match_constant, matcher.match

    def match_constant(self: Any, named: Any, value: ir.Value) -> bool:
        if not within_tolerance(self, named, value):
            return False
        return _equal(named.value, value) or self.fail(f"{value.name} is not {named.value}")

    def match(self: Any, model: Any, graph: Any, node: ir.Node, **settings: Any) -> Any:
        if not self.pattern.has_single_output_node:
            here = self.pattern.output_nodes[0].matches(node, MatchResult())
            if not here:
                return here
        try:
            return everywhere(self, model, graph, node, **settings)
        finally:  # a rule stays, and would keep the last graph, weights included
            self._graph = self._match = self._current_node = None

    matcher._match_constant, matcher.match = match_constant, match
    try:
        yield
    finally:
        matcher._match_constant, matcher.match = within_tolerance, everywhere


@contextlib.contextmanager
def ops_read_once() -> Iterator[None]:
    """Let the exporter read the sources of its five hundred ops once, not in every export, where
    that would take a third of the time."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    apis: Any = onnxscript_apis  # gives a module's names, and here one of its own
    apis.get_torchlib_ops = functools.partial(_ops, apis.get_torchlib_ops)
    try:
        yield
    finally:
        del apis.get_torchlib_ops


@functools.cache
def _ops(read: Callable[[], list[Any]]) -> list[Any]:
    return read()


def _equal(named: Any, value: ir.Value) -> bool:
    """Whether a constant is the number that a rule names, rounded as the constant is."""
    assert value.const_value is not None
    found = value.const_value.numpy()
    return np.array_equal(found, np.asarray(named).astype(found.dtype))
