"""Recurrent layers: ONNX keeps the gates' weights in one tensor, and in another order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paredown.graph.doors.onnx.patterns.match import Change, Pattern, View
from paredown.graph.doors.onnx.program import Array, Node

GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}  # PyTorch's order in ONNX's
USUAL = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}


def layer(view: View, node: Node) -> Change:
    """One node, with the weights of each direction as PyTorch has them.

    Raises:
        UserError: PyTorch has no such layer.
    """
    ways = 2 if node.attributes.get("direction", "forward") == "bidirectional" else 1
    relu = _checked(node, ways)
    weights, states, biases = (view.known(_input(node, place)) for place in (1, 2, 3))
    if weights is None or states is None or (biases is None and _input(node, 3)):
        raise node.refused("has weights that are computed from the data", "data")
    _check_lengths(view, node)
    known: dict[str, Array] = {}
    names = []
    for way in range(ways):
        parts = {_input(node, 1): weights[way], _input(node, 2): states[way]}
        halves: list[Array] = [] if biases is None else np.split(biases[way], 2)
        parts |= {f"{_input(node, 3)}.{n}": half for n, half in zip("ih", halves, strict=False)}
        for name, array in parts.items():
            own = f"{name}.{['forward', 'reverse'][way]}" if ways == 2 else name
            known[own] = _ordered(array, node.op)
            names.append(own)
    width = states.shape[-1]
    told: Mapping[str, Any] = {
        **{"kind": node.op, "ways": ways, "biased": biases is not None, "hidden_size": width},
        **{"relu": relu, "layout": node.attributes.get("layout", 0)},
    }
    first = [_input(node, place) for place in ((5, 6) if node.op == "LSTM" else (5,))]
    inputs = (node.inputs[0], *names, *first)
    return Change(replace(node, op="paredown.Recurrent", inputs=inputs, attributes=told), known)


def _input(node: Node, place: int) -> str:
    return node.inputs[place] if place < len(node.inputs) else ""


def _ordered(array: Array, kind: str) -> Array:
    """(gates H, ...) with the gates as PyTorch has them."""
    gates = np.split(array, len(GATES[kind]))
    return np.concatenate([gates[place] for place in GATES[kind]])


def _checked(node: Node, ways: int) -> bool:
    """Whether it is a plain layer with ReLU; refuses what PyTorch's layers do not do."""
    told = node.attributes
    usual = USUAL[node.op] * ways
    functions = [each.lower() for each in told.get("activations", usual)]
    relu = node.op == "RNN" and functions == ["relu"] * ways
    if functions != usual and not relu:
        raise node.refused(f"has the activations {', '.join(functions)}, which PyTorch's has not")
    if told.get("direction", "forward") == "reverse":
        raise node.refused("goes backwards alone")
    if told.get("clip") or told.get("input_forget", 0):
        raise node.refused("cuts its sums, or couples its gates")
    if node.op == "GRU" and not told.get("linear_before_reset", 0):
        raise node.refused("resets its state before the product (linear_before_reset=0)")
    if _input(node, 7):
        raise node.refused("has peepholes")
    return relu


def _check_lengths(view: View, node: Node) -> None:
    """Sequences of lengths of their own would have to be known."""
    name = _input(node, 4)
    if not name:
        return
    raise node.refused("has lengths of its sequences, which come from the data", "data")


PATTERNS: dict[str, tuple[Pattern, ...]] = {"LSTM": (layer,), "GRU": (layer,), "RNN": (layer,)}
