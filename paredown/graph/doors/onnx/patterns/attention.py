"""Attention that is written out: ``softmax(q k^T * scale + mask) v``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from paredown.graph.doors.onnx.patterns.match import Change, Pattern, View
from paredown.graph.doors.onnx.program import Node

ATTENTION = "paredown.Attention"


@dataclass(frozen=True)
class _Keys:
    """The keys (..., T, E), and the node that gives them where none of the file does."""

    name: str
    made: tuple[Node, ...] = ()


def attention(view: View, node: Node) -> Change | None:
    """From the product with the values back to the queries and keys."""
    softmax = _softmax(view, node.inputs[0])
    if softmax is None or softmax.attributes.get("axis", -1 if softmax.version >= 13 else 1) != -1:
        return None
    scores, mask = _masked(view, softmax.inputs[0])
    number, factors = view.factors(scores)
    product = view.maker(factors[0], "MatMul") if len(factors) == 1 else None
    if product is None:
        return None
    left, query = _scaled(view, product.inputs[0])
    right, turned = _scaled(view, product.inputs[1])
    keys = _keys(view, turned, f"{node.outputs[0]}_keys")
    if keys is None or view.known(node.inputs[1]) is not None:
        return None
    inputs = (query, keys.name, node.inputs[1], *([mask] if mask else []))
    made = replace(node, op=ATTENTION, inputs=inputs, attributes={"scale": number * left * right})
    return Change(made, {}, keys.made)


def _softmax(view: View, name: str) -> Node | None:
    """Behind the dropout and the guard against rows that are masked as a whole."""
    found = view.maker(name, "Softmax", "Where", "Dropout")
    if found is not None and found.op == "Where":
        inside = view.maker(found.inputs[2], "Softmax")
        bad = view.maker(found.inputs[0], "IsNaN")
        zero = view.number(found.inputs[1]) == 0.0
        if inside is None or bad is None or not zero or bad.inputs[0] != inside.outputs[0]:
            return None
        return inside
    return found if found is not None and found.op == "Softmax" else None


def _masked(view: View, name: str) -> tuple[str, str]:
    """The scores, and what is added to them."""
    total = view.maker(name, "Add")
    if total is None:
        return name, ""
    for place in (0, 1):
        _, factors = view.factors(total.inputs[place])
        product = view.maker(factors[0], "MatMul") if len(factors) == 1 else None
        if product is not None:
            return total.inputs[place], total.inputs[1 - place]
    return name, ""


def _scaled(view: View, name: str) -> tuple[float, str]:
    """The number in a product with one, and the rest."""
    number, factors = view.factors(name)
    return (number, factors[0]) if len(factors) == 1 else (1.0, name)


def _keys(view: View, name: str, made: str) -> _Keys | None:
    turn = view.maker(name, "Transpose", "Reshape")
    if turn is None:
        return None
    if turn.op == "Reshape":
        return _through_three(view, turn)
    order = list(turn.attributes.get("perm") or [])
    if len(order) < 3:
        return None
    last = [*order[:-2], order[-1], order[-2]]
    if last == sorted(last):
        return _Keys(turn.inputs[0])
    return _Keys(made, (replace(turn, outputs=(made,), attributes={"perm": last}),))


def _through_three(view: View, back: Node) -> _Keys | None:
    """PyTorch's exporter turns keys of four axes as (B heads, T, E)."""
    turn = view.maker(back.inputs[0], "Transpose")
    flat = view.maker(turn.inputs[0], "Reshape") if turn is not None else None
    if turn is None or flat is None or list(turn.attributes.get("perm") or []) != [0, 2, 1]:
        return None
    source = flat.inputs[0]
    there, here = _sizes_of(view, flat.inputs[1]), _sizes_of(view, back.inputs[1])
    if there is None or here is None or len(there) != 3 or len(here) != 4:
        return None
    if there[0] != "-1" or here[-2:] != [there[2], there[1]]:
        return None
    shape = _shape_of(view, flat.inputs[1])
    return _Keys(source) if shape in (source, None) else None


def _sizes_of(view: View, name: str) -> list[str] | None:
    """A shape's parts, each as the name or the number that it comes from."""
    known = view.numbers(name)
    if known is not None:
        return [str(each) for each in known]
    concat = view.maker(name, "Concat")
    if concat is None:
        return None
    parts: list[str] = []
    for each in concat.inputs:
        numbers = view.numbers(each)
        parts += [each] if numbers is None else [str(number) for number in numbers]
    slices = [view.maker(each, "Slice") for each in concat.inputs]
    wide = [node for node in slices if node is not None and _width(view, node) > 1]
    return parts if not wide else [*parts[:-3], "", *parts[-3:]]


def _width(view: View, node: Node) -> int:
    """How many sizes a slice of a shape of four has, where its bounds tell: two before the last."""
    bounds = [view.numbers(name) for name in node.inputs[1:3]]
    if any(each is None for each in bounds):
        return 1
    (start, *_), (end, *_) = bounds[0] or [0], bounds[1] or [0]
    return 2 if start < -(2**31) and end == -2 else 1


def _shape_of(view: View, name: str) -> str | None:
    """Whose shape a reshape's sizes are slices of."""
    concat = view.maker(name, "Concat")
    for each in concat.inputs if concat is not None else ():
        part = view.maker(each, "Slice")
        shape = view.maker(part.inputs[0], "Shape") if part is not None else None
        if shape is not None:
            return shape.inputs[0]
    return None


PATTERNS: dict[str, tuple[Pattern, ...]] = {"MatMul": (attention,)}
