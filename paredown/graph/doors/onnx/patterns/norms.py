"""Normalisations that are written out: layer norm, RMS norm, group norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paredown.graph.doors.onnx.patterns.match import Change, Pattern, View
from paredown.graph.doors.onnx.program import Node

LAYER, RMS, GROUP = "LayerNormalization", "RMSNormalization", "paredown.GroupNorm"


def _as(node: Node, op: str, inputs: tuple[str, ...], **attributes: Any) -> Node:
    return replace(node, op=op, inputs=inputs, attributes=attributes)


def normalised(view: View, node: Node) -> Node | None:
    """``x / sqrt(mean(x * x) + eps)`` over the last axis, and the same of ``x - mean(x)``."""
    found = _over_root(view, node)
    if found is None:
        return None
    x, total = found
    sum_ = view.plus(total)
    mean = view.maker(sum_[0], "ReduceMean") if sum_ is not None else None
    if sum_ is None or mean is None or not _is_last(view, mean):
        return None
    squared = _squared(view, mean.inputs[0])
    if squared is None:
        return None
    centred, of_square = _centred(view, x), _centred(view, squared)
    if centred is not None and centred == of_square:
        return _as(node, LAYER, (centred,), epsilon=sum_[1], axis=-1)
    return _as(node, RMS, (x,), epsilon=sum_[1], axis=-1) if squared == x else None


def _over_root(view: View, node: Node) -> tuple[str, str] | None:
    """x and y of ``x / sqrt(y)``, however it is written."""
    if node.op == "Div":
        root = _root(view, node.inputs[1])
        return None if root is None else (node.inputs[0], root)
    for place in (0, 1):
        over = view.maker(node.inputs[place], "Reciprocal", "Pow", "Div")
        if over is None:
            continue
        if over.op == "Reciprocal":
            root = _root(view, over.inputs[0])
        elif over.op == "Pow":
            root = over.inputs[0] if view.number(over.inputs[1]) == -0.5 else None
        else:
            root = _root(view, over.inputs[1]) if view.number(over.inputs[0]) == 1.0 else None
        if root is not None:
            return node.inputs[1 - place], root
    return None


def _root(view: View, name: str) -> str | None:
    """What a value is the square root of."""
    node = view.maker(name, "Sqrt", "Pow")
    if node is None or (node.op == "Pow" and view.number(node.inputs[1]) != 0.5):
        return None
    return node.inputs[0]


def _squared(view: View, name: str) -> str | None:
    """What a value is the square of."""
    node = view.maker(name, "Pow", "Mul")
    if node is None:
        return None
    if node.op == "Pow":
        return node.inputs[0] if view.number(node.inputs[1]) == 2.0 else None
    return node.inputs[0] if node.inputs[0] == node.inputs[1] else None


def _centred(view: View, name: str) -> str | None:
    """The x of ``x - mean(x)``."""
    node = view.maker(name, "Sub")
    mean = view.maker(node.inputs[1], "ReduceMean") if node is not None else None
    if node is None or mean is None or mean.inputs[0] != node.inputs[0]:
        return None
    return node.inputs[0] if _is_last(view, mean) else None


def _is_last(view: View, mean: Node) -> bool:
    return view.axes(mean) == [-1] and bool(mean.attributes.get("keepdims", 1))


def scaled(view: View, node: Node) -> Node | None:
    """A norm of the last axis and the weight after it."""
    found = view.other(node, LAYER, RMS)
    if found is None:
        return None
    norm, weight = found
    array = view.known(weight)
    if array is None or array.ndim != 1 or array.size < 2 or not _bare(view, norm, 1):
        return None
    return replace(norm, inputs=(*norm.inputs, weight), outputs=node.outputs)


def shifted(view: View, node: Node) -> Node | None:
    """A layer norm with a weight, and the bias after it."""
    found = view.other(node, LAYER)
    if found is None:
        return None
    norm, bias = found
    array = view.known(bias)
    if array is None or not _bare(view, norm, 2):
        return None
    weight = view.known(norm.inputs[1])
    if weight is None or array.shape != weight.shape or norm.attributes.get("axis", -1) != -1:
        return None
    return replace(norm, inputs=(*norm.inputs[:2], bias), outputs=node.outputs)


def _bare(view: View, norm: Node, inputs: int) -> bool:
    """Whether it has so many inputs, one output, and that is read once."""
    given = [name for name in norm.inputs if name]
    return len(given) == inputs and not any(norm.outputs[1:]) and view.uses[norm.outputs[0]] == 1


def grouped(view: View, node: Node) -> Node | None:
    """PyTorch's exporter writes a group norm as an instance norm of the groups, without weights,
    between two reshapes."""
    norm = view.maker(node.inputs[0], "InstanceNormalization")
    inside = view.maker(norm.inputs[0], "Reshape") if norm is not None else None
    if norm is None or inside is None:
        return None
    scale, shift = view.known(norm.inputs[1]), view.known(norm.inputs[2])
    sizes = view.numbers(inside.inputs[1])
    if scale is None or shift is None or sizes is None or len(sizes) != 3 or sizes[2] != -1:
        return None
    if not np.all(scale == 1) or np.any(shift != 0) or scale.size != sizes[1]:
        return None
    told: Mapping[str, Any] = {
        "num_groups": sizes[1],
        "epsilon": norm.attributes.get("epsilon", 1e-5),
    }
    x, back = inside.inputs[0], view.maker(node.inputs[1], "Shape")
    if back is not None and back.inputs[0] == x and not back.attributes.get("start", 0):
        return _as(node, GROUP, (x,), **told) if "end" not in back.attributes else None
    shape = view.numbers(node.inputs[1])
    if shape is None or len(shape) < 3 or shape[1] <= 0 or shape[1] % sizes[1]:
        return None
    return _as(node, GROUP, (x,), shape=shape, **told)


def group_scaled(view: View, node: Node) -> Change | None:
    """A group norm, and what scales its channels, or is added to them, after it."""
    found = view.other(node, GROUP)
    if found is None:
        return None
    norm, name = found
    array = view.known(name)
    if array is None or not _bare(view, norm, 1 if node.op == "Mul" else 2):
        return None
    shape = array.shape[1:] if array.ndim > 2 and array.shape[0] == 1 else array.shape
    channels = view.known(norm.inputs[1]) if node.op == "Add" else array
    one_axis = len(shape) > 1 and set(shape[1:]) == {1} and shape[0] > 1
    if not one_axis or channels is None or channels.size != array.size or view.uses[name] > 1:
        return None
    made = replace(norm, inputs=(*norm.inputs, name), outputs=node.outputs)
    return Change(made, {name: array.reshape(-1)})


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "Div": (normalised,),
    "Mul": (normalised, scaled, group_scaled),
    "Add": (shifted, group_scaled),
    "Reshape": (grouped,),
}
