"""Products with a weight, and the sum with a bias after them: one linear layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from paredown.graph.doors.onnx.patterns.match import Change, Pattern, View
from paredown.graph.doors.onnx.program import Array, Node

LINEAR = "paredown.Linear"


def turned(view: View, name: str) -> Array | None:
    """A weight (inputs, outputs) as PyTorch has it; None where something else reads it too."""
    array = view.known(name)
    if array is None or array.ndim != 2 or array.dtype.kind != "f":
        return None
    readers = [node for node in view.program.nodes if name in node.inputs]
    if view.uses[name] != len(readers) or not all(_reads_turned(node, name) for node in readers):
        return None
    return np.ascontiguousarray(array.T)


def _reads_turned(node: Node, name: str) -> bool:
    if len(node.inputs) < 2 or node.inputs[1] != name or node.inputs.count(name) != 1:
        return False
    return node.op == "MatMul" or (node.op == "Gemm" and _is_plain(node, turned=False))


def _is_plain(gemm: Node, turned: bool) -> bool:
    told = gemm.attributes
    scales = told.get("alpha", 1.0), told.get("beta", 1.0) if len(gemm.inputs) > 2 else 1.0
    sides = told.get("transA", 0), told.get("transB", 0)
    return scales == (1.0, 1.0) and sides == (0, int(turned))


def product(view: View, node: Node) -> Change | Node | None:
    """A MatMul with a weight, or with one that a Transpose turns."""
    x, weight = node.inputs
    array = turned(view, weight)
    if array is not None:
        return Change(replace(node, op=LINEAR), {weight: array})
    turn = view.maker(weight, "Transpose")
    if turn is not None and _turns_weight(view, turn):
        return replace(node, op=LINEAR, inputs=(x, turn.inputs[0]))
    return None


def _turns_weight(view: View, turn: Node) -> bool:
    array = view.known(turn.inputs[0])
    order = turn.attributes.get("perm", [1, 0])
    return (
        array is not None and array.ndim == 2 and list(order) == [1, 0] and array.dtype.kind == "f"
    )


def gemm(view: View, node: Node) -> Change | Node | None:
    """A Gemm with a weight, and a bias of one axis."""
    weight = node.inputs[1]
    array, known = view.known(weight), {}
    if array is None or array.dtype.kind != "f":
        turn = view.maker(weight, "Transpose")
        if turn is None or not _turns_weight(view, turn) or not _is_plain(node, turned=False):
            return None
        weight = turn.inputs[0]
        outputs = view.program.known[weight].shape[0]
    elif _is_plain(node, turned=True):
        outputs = array.shape[0]
    else:
        made = turned(view, weight) if _is_plain(node, turned=False) else None
        if made is None:
            return None
        known[weight], outputs = made, made.shape[0]
    inputs: tuple[str, ...] = (node.inputs[0], weight)
    if len(node.inputs) > 2 and node.inputs[2]:
        bias = view.known(node.inputs[2])
        if bias is None or bias.size != outputs:
            return None
        if bias.ndim > 1 and view.uses[node.inputs[2]] > 1:
            return None
        known[node.inputs[2]] = bias.reshape(-1)
        inputs = (*inputs, node.inputs[2])
    return Change(replace(node, op=LINEAR, inputs=inputs, attributes={}), known)


def bias(view: View, node: Node) -> Change | None:
    """The sum of a linear layer and a known vector."""
    found = view.other(node, LINEAR)
    if found is None:
        return None
    layer, name = found
    array, weight = view.known(name), view.known(layer.inputs[1])
    if array is None or weight is None or len(layer.inputs) > 2 or view.uses[layer.outputs[0]] != 1:
        return None
    if (
        array.size != weight.shape[0]
        or array.shape[-1:] != (array.size,)
        or array.dtype.kind != "f"
    ):
        return None
    if array.ndim > 1 and (view.uses[name] > 1 or array.ndim > 3):
        return None
    made = replace(node, op=LINEAR, inputs=(*layer.inputs, name), attributes={})
    return Change(made, {name: array.reshape(-1)})


def conv_bias(view: View, node: Node) -> Change | None:
    """The sum of a convolution and a known number for each channel."""
    found = view.other(node, "Conv", "ConvTranspose")
    if found is None:
        return None
    layer, name = found
    array, weight = view.known(name), view.known(layer.inputs[1])
    has = len(layer.inputs) > 2 and layer.inputs[2]
    if array is None or weight is None or has or view.uses[layer.outputs[0]] != 1:
        return None
    group = layer.attributes.get("group", 1)
    channels = weight.shape[0] if layer.op == "Conv" else weight.shape[1] * group
    rank = weight.ndim - 2
    wanted = (channels, *[1] * rank)
    if array.shape not in (wanted, (1, *wanted)) or view.uses[name] > 1 or channels == 1:
        return None
    made = replace(node, op=layer.op, inputs=(*layer.inputs[:2], name), attributes=layer.attributes)
    return Change(replace(made, version=layer.version), {name: array.reshape(-1)})


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    "MatMul": (product,),
    "Gemm": (gemm,),
    "Add": (bias, conv_bias),
}
