"""Activations that are written out: GELU by erf and by tanh, SiLU, hard-swish, Mish."""

from __future__ import annotations

import math
from dataclasses import replace

from paredown.graph.doors.onnx.patterns.match import Pattern, View, about
from paredown.graph.doors.onnx.program import Node


def _as(node: Node, op: str, x: str, **attributes: float | str) -> Node:
    return replace(node, op=op, inputs=(x,), attributes=attributes)


def gelu(view: View, node: Node) -> Node | None:
    """``x / 2 * (1 + erf(x / sqrt(2)))``, in any order."""
    number, factors = view.factors(node.outputs[0])
    for place, x in _one_of_two(factors, number, 0.5):
        total = view.plus(place)
        erf = view.maker(total[0], "Erf") if total and about(total[1], 1.0) else None
        if erf is None:
            continue
        scale, inside = view.factors(erf.inputs[0])
        if inside == [x] and about(scale, math.sqrt(0.5)):
            return _as(node, "Gelu", x)
    return None


def _one_of_two(factors: list[str], number: float, wanted: float) -> list[tuple[str, str]]:
    """Both ways to tell two factors apart, where the number beside them is this one."""
    if len(factors) != 2 or not about(number, wanted):
        return []
    return [(factors[0], factors[1]), (factors[1], factors[0])]


def gelu_tanh(view: View, node: Node) -> Node | None:
    """``x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))``, in any order."""
    number, factors = view.factors(node.outputs[0])
    for place, x in _one_of_two(factors, number, 0.5):
        total = view.plus(place)
        tanh = view.maker(total[0], "Tanh") if total and about(total[1], 1.0) else None
        if tanh is not None and _is_inside(view, tanh.inputs[0], x):
            return _as(node, "Gelu", x, approximate="tanh")
    return None


def _is_inside(view: View, name: str, x: str) -> bool:
    scale, factors = view.factors(name)
    if not about(scale, math.sqrt(2 / math.pi)):
        return False
    if len(factors) == 2 and x in factors:  # x (1 + 0.044715 x x)
        (rest,) = [each for each in factors if each != x] or [""]
        total = view.plus(rest)
        return total is not None and about(total[1], 1.0) and _is_power(view, total[0], x, 2)
    total_node = view.maker(factors[0], "Add") if len(factors) == 1 else None
    if total_node is None or x not in total_node.inputs:
        return False
    (cube,) = [each for each in total_node.inputs if each != x] or [""]
    return _is_power(view, cube, x, 3)


def _is_power(view: View, name: str, x: str, power: int) -> bool:
    """Whether it is ``0.044715 * x ** power``."""
    scale, factors = view.factors(name)
    if not about(scale, 0.044715):
        return False
    if factors == [x] * power:
        return True
    node = view.maker(factors[0], "Pow") if len(factors) == 1 else None
    return node is not None and node.inputs[0] == x and view.number(node.inputs[1]) == power


def gated(view: View, node: Node) -> Node | None:
    """``x * sigmoid(x)``, ``x * hard_sigmoid(x)``, ``x * tanh(softplus(x))``."""
    found = view.other(node, "Sigmoid", "HardSigmoid", "Tanh")
    if found is None:
        return None
    gate, x = found
    if gate.op == "Tanh":
        soft = view.maker(gate.inputs[0], "Softplus")
        return _as(node, "Mish", x) if soft is not None and soft.inputs[0] == x else None
    if gate.inputs[0] != x:
        return None
    if gate.op == "Sigmoid":
        return _as(node, "paredown.Silu", x)
    usual = about(gate.attributes.get("alpha", 0.2), 1 / 6)
    return _as(node, "HardSwish", x) if usual and gate.attributes.get("beta", 0.5) == 0.5 else None


def hard_swish(view: View, node: Node) -> Node | None:
    """``x * clip(x + 3, 0, 6) / 6``, in any order, and the gate alone."""
    number, factors = view.factors(node.outputs[0])
    if not about(number, 1 / 6):
        return None
    if len(factors) == 1:
        x = _shifted(view, factors[0])
        return None if x is None else _as(node, "HardSigmoid", x, alpha=1 / 6, beta=0.5)
    for place, x in _one_of_two(factors, number, 1 / 6):
        if _shifted(view, place) == x:
            return _as(node, "HardSwish", x)
    return None


def _shifted(view: View, name: str) -> str | None:
    """The x of ``clip(x + 3, 0, 6)``."""
    clip = view.maker(name, "Clip")
    total = view.plus(clip.inputs[0]) if clip is not None else None
    if clip is None or total is None or total[1] != 3.0:
        return None
    told = [clip.attributes.get("min"), clip.attributes.get("max")]
    for place in (1, 2):
        if len(clip.inputs) > place and clip.inputs[place]:
            told[place - 1] = view.number(clip.inputs[place])
    return total[0] if told == [0.0, 6.0] else None


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "Mul": (gelu, gelu_tanh, gated, hard_swish),
    "Div": (gelu, gelu_tanh, hard_swish),
}
