"""Files that are quantized already: what remains of them is the float model.

Weights are what their integers stand for. Where activations were rounded and came back to float at
once, they stay float; a range that begins at zero stays, since exporters leave out a ReLU before
it. Ops on integers are written as the same ops between such pairs first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from paredown.graph.doors.onnx.call import Call, Known, as_tensor
from paredown.graph.doors.onnx.ops.quantized import n_bits
from paredown.graph.doors.onnx.patterns.match import Change, Pattern, View, same
from paredown.graph.doors.onnx.program import Array, Node, Program

DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear")
MOVERS = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool", "Gather")
POSITIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")
LEAST = {"uint8": 0, "int8": -128, "uint16": 0, "int16": -32768}
# QLinear op -> the float op, and the places of its tensors: each with scale and zero point.
JOINED: Mapping[str, tuple[str, tuple[int, ...], int]] = {
    "QLinearConv": ("Conv", (0, 3), 6),
    "QLinearMatMul": ("MatMul", (0, 3), 6),
    "com.microsoft.QLinearAdd": ("Add", (0, 3), 6),
    "com.microsoft.QLinearMul": ("Mul", (0, 3), 6),
    "com.microsoft.QLinearSigmoid": ("Sigmoid", (0,), 3),
    "com.microsoft.QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3),
    "com.microsoft.QLinearLeakyRelu": ("LeakyRelu", (0,), 3),
    "com.microsoft.QLinearAveragePool": ("AveragePool", (0,), 3),
    "com.microsoft.QLinearSoftmax": ("Softmax", (0,), 3),
    "com.microsoft.QGemm": ("Gemm", (0, 3), 7),
}
BIASES = {"Conv": 8, "Gemm": 6}


def apart(view: View, node: Node) -> Change | None:
    """An op on integers as the float op between its tensors' dequantization and quantization."""
    op, places, result = JOINED[node.op]
    if node.attributes.get("channels_last", 0):
        return None
    made = node.outputs[0]
    before = [_float_of(node, op, place) for place in places]
    inputs = [each.outputs[0] for each in before]
    known = {}
    bias = BIASES.get(op)
    if bias is not None and len(node.inputs) > bias and node.inputs[bias]:
        scales = view.known(node.inputs[1]), view.known(node.inputs[4])
        if scales[0] is None or scales[1] is None:
            return None
        known[f"{made}_bias_scale"] = (scales[0] * scales[1]).astype(np.float32)
        told, name = (node.inputs[bias], f"{made}_bias_scale"), f"{made}_bias"
        before.append(Node(DEQUANTIZE[0], told, (name,), {"axis": 0}, node.name, 13))
        inputs.append(name)
    kept = {k: v for k, v in node.attributes.items() if k not in ("channels_last", "opset")}
    version = node.attributes.get("opset", 13)
    before.append(Node(op, tuple(inputs), (f"{made}_float",), kept, node.name, version))
    return _rounded(node, before, node.inputs[result : result + 2], known)


def _rounded(
    node: Node, before: list[Node], scale: tuple[str, ...], known: Mapping[str, Array]
) -> Change:
    """With the quantization of the result, where it is asked for."""
    if not any(scale):
        return Change(replace(before[-1], outputs=node.outputs), known, tuple(before[:-1]))
    inputs = (before[-1].outputs[0], *scale)
    return Change(Node(QUANTIZE[0], inputs, node.outputs, {}, node.name, 13), known, tuple(before))


def _float_of(node: Node, op: str, place: int) -> Node:
    """The dequantization of one of the tensors."""
    axis = {"Conv": 0 if place else 1, "MatMul": -1 if place else -2}.get(op, 1)
    if op == "Gemm" and place:
        axis = 0 if node.attributes.get("transB", 0) else 1
    triple = tuple(node.inputs[place : place + 3])
    made = (f"{node.outputs[0]}_{place}_float",)
    return Node(DEQUANTIZE[0], triple, made, {"axis": axis}, node.name, 13)


def concat(view: View, node: Node) -> Change:
    """ONNX Runtime's QLinearConcat, whose tensors stand after the result's scale."""
    del view
    before = [_float_of(node, "Concat", place) for place in range(2, len(node.inputs), 3)]
    inputs = tuple(each.outputs[0] for each in before)
    made = (f"{node.outputs[0]}_float",)
    before.append(Node("Concat", inputs, made, node.attributes, node.name, 13))
    return _rounded(node, before, node.inputs[:2], {})


def pair(view: View, node: Node) -> Node | None:
    """A value that is rounded and comes back: it stays as it is, or above zero."""
    rounded = view.maker(node.inputs[0], *QUANTIZE)
    if rounded is None or len(rounded.inputs) < 2:
        return None
    if not _alike(view, rounded, node, 1):
        return None
    has_zero = len(rounded.inputs) > 2 and bool(rounded.inputs[2])
    zero = view.known(rounded.inputs[2]) if has_zero else np.zeros((), np.uint8)
    if zero is None or (has_zero and not _alike(view, rounded, node, 2)):
        return None
    source = view.makers.get(rounded.inputs[0])
    positive = source is not None and source.op in POSITIVE
    least = LEAST.get(zero.dtype.name)
    if least is None:
        return None
    floor = bool(np.all(zero == least)) and not positive
    return Node(
        "Relu" if floor else "Identity", rounded.inputs[:1], node.outputs, {}, node.name, 14
    )


def moved(view: View, node: Node) -> Change | None:
    """Integers that are only moved before they come back to float: moved as floats."""
    mover = view.maker(node.inputs[0], *MOVERS)
    scale = view.known(node.inputs[1])
    if mover is None or scale is None or scale.size != 1:
        return None
    name = f"{node.outputs[0]}_before"
    before = replace(node, inputs=(mover.inputs[0], *node.inputs[1:]), outputs=(name,))
    after = replace(mover, inputs=(name, *mover.inputs[1:]), outputs=node.outputs)
    return Change(after, {}, (before,))


def _alike(view: View, one: Node, other: Node, place: int) -> bool:
    """Whether both have the same scale, or zero point."""
    if len(other.inputs) <= place:
        return False
    a, b = one.inputs[place], other.inputs[place]
    return a == b or same(view.known(a), view.known(b))


def dynamic(view: View, node: Node) -> Change | None:
    """A product of integers whose input is rounded by its own range, and its scales after it."""
    found = view.other(node, "Cast")
    if found is None:
        return None
    cast, scales = found
    product = view.maker(cast.inputs[0], "MatMulInteger", "ConvInteger")
    both = view.maker(scales, "Mul")
    if product is None or both is None:
        return None
    rounded = view.maker(product.inputs[0], "DynamicQuantizeLinear")
    if rounded is None or rounded.outputs[1] not in both.inputs:
        return None
    (scale,) = [name for name in both.inputs if name != rounded.outputs[1]] or [""]
    if view.known(scale) is None or view.known(product.inputs[1]) is None:
        return None
    if list(product.inputs[2:3]) != [rounded.outputs[2]]:
        return None
    conv = product.op == "ConvInteger"
    weight = f"{node.outputs[0]}_weight"
    told = (product.inputs[1], scale, *product.inputs[3:4])
    known = {}
    if conv:  # its scales may have the axes of the output
        flat = view.program.known[scale].reshape(-1)
        known[f"{weight}_scale"] = flat if flat.size > 1 else flat.reshape(())
        told = (product.inputs[1], f"{weight}_scale", *product.inputs[3:4])
    axis = {"axis": 0 if conv else -1}
    before = Node(DEQUANTIZE[0], told, (weight,), axis, node.name, 13)
    op, inputs = ("Conv" if conv else "MatMul"), (rounded.inputs[0], weight)
    made = replace(
        product, op=op, inputs=inputs, outputs=node.outputs, attributes=product.attributes
    )
    return Change(replace(made, version=13), known, (before,))


def few_bits(view: View, node: Node) -> Change | None:
    """A MatMulNBits as a linear layer with the weight that its blocks stand for."""
    arrays = [view.known(name) for name in node.inputs[1:]]
    if any(array is None for array in arrays[:2]) or len(node.inputs) > 5:
        return None
    values = (None, *(None if a is None else Known("", a) for a in arrays))
    weight = n_bits(Call(node, values, lambda known: as_tensor(known.array)))
    name = node.inputs[1]
    made = replace(node, op="paredown.Linear", inputs=(node.inputs[0], name), attributes={})
    return Change(made, {name: weight.to(torch.float32).contiguous().numpy()})


def notes(before: Program, after: Program) -> list[str]:
    """What became of a quantized file."""
    there, here = (Counter(node.op for node in p.nodes) for p in (before, after))
    whole = ("com.microsoft.QLinearConcat", "MatMulInteger", "ConvInteger")
    names = [*DEQUANTIZE, *JOINED, *whole, "com.microsoft.MatMulNBits"]
    found = {name: there[name] for name in names if there[name]}
    if not found:
        return []
    told = ", ".join(f"{count} {name.rpartition('.')[2]}" for name, count in found.items())
    left = sum(here[name] for name in (*names, *QUANTIZE, "DynamicQuantizeLinear"))
    rest = f"; {left} of these ops stay, and round as in the file" if left else ""
    return [
        f"the file is quantized ({told}): its weights are what their integers stand for, and "
        "values that it rounds on the way are not rounded here, by which its outputs "
        f"differ{rest}; Quantize rounds them anew"
    ]


_APART: dict[str, tuple[Pattern, ...]] = dict.fromkeys(JOINED, (apart,))
_PAIRS: dict[str, tuple[Pattern, ...]] = dict.fromkeys(DEQUANTIZE, (pair, moved))
PATTERNS: dict[str, tuple[Pattern, ...]] = {
    **_APART,
    **_PAIRS,
    "com.microsoft.QLinearConcat": (concat,),
    **{"Mul": (dynamic,), "com.microsoft.MatMulNBits": (few_bits,)},
}
