"""Binary and ternary weights in an ONNX file: packed into bytes, unpacked by standard ops.

The ops stand in a function of the file. ONNX Runtime puts a function's ops in the place of its
calls and computes what is constant when it opens a file, so that weights are unpacked once. What
then runs is a float kernel, or an integer one where the activations are quantized too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import values as onnxscript_values

from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.quantized.forms import WEIGHT_FORMS, Form, Rounded
from paredown.graph.quantized.low_bits import BINARY, TERNARY
from paredown.graph.quantized.rounding import spread
from paredown.targets.formats.onnx.edit import attribute, initializer, insert, tensor

DOMAIN = "paredown"
WEIGHTED = ("Conv", "Gemm", "MatMul")  # ops with an integer kernel

# (ceil(N / 8),) bytes -> N signs as int8; bit k of a byte is that of weight 8 * byte + k.
_UNPACK_BINARY = """
<domain: "paredown", opset_import: ["": 20]>
UnpackBinary <shape> (packed) => (integers)
{
    masks = Constant <value = uint8[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
    up = Constant <value = int8 {1}> ()
    down = Constant <value = int8 {-1}> ()
    inner = Constant <value_ints = [1]> ()
    start = Constant <value_ints = [0]> ()
    flat = Constant <value_ints = [-1]> ()
    sizes = Constant <value_ints: ints = @shape> ()
    count = ReduceProd <keepdims = 1> (sizes)
    bytes = Unsqueeze (packed, inner)
    bits = BitwiseAnd (bytes, masks)
    set = Cast <to = 9> (bits)
    groups = Where (set, up, down)
    line = Reshape (groups, flat)
    used = Slice (line, start, count)
    integers = Reshape (used, sizes)
}
"""
# (ceil(N / 4),) bytes -> N of -1, 0, 1 as int8; two bits hold the weight plus one.
_UNPACK_TERNARY = """
<domain: "paredown", opset_import: ["": 20]>
UnpackTernary <shape> (packed) => (integers)
{
    shifts = Constant <value = uint8[4] {0, 2, 4, 6}> ()
    mask = Constant <value = uint8 {3}> ()
    one = Constant <value = int32 {1}> ()
    inner = Constant <value_ints = [1]> ()
    start = Constant <value_ints = [0]> ()
    flat = Constant <value_ints = [-1]> ()
    sizes = Constant <value_ints: ints = @shape> ()
    count = ReduceProd <keepdims = 1> (sizes)
    bytes = Unsqueeze (packed, inner)
    shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
    pairs = BitwiseAnd (shifted, mask)
    whole = Cast <to = 6> (pairs)
    groups = Sub (whole, one)
    line = Reshape (groups, flat)
    used = Slice (line, start, count)
    shaped = Reshape (used, sizes)
    integers = Cast <to = 3> (shaped)
}
"""


@dataclass(frozen=True)
class _Kind:
    """How the weights behind one quantizer are stored."""

    function: str
    text: str
    form: Form


KINDS = {
    "FakeQuantizeBinary": _Kind("UnpackBinary", _UNPACK_BINARY, WEIGHT_FORMS["binary"]),
    "FakeQuantizeTernary": _Kind("UnpackTernary", _UNPACK_TERNARY, WEIGHT_FORMS["ternary"]),
}


def _binary(weight: Any, axis: int) -> Any:
    return onnxscript_values.Opset(DOMAIN, 1).FakeQuantizeBinary(weight, axis=axis)


def _ternary(weight: Any, axis: int) -> Any:
    return onnxscript_values.Opset(DOMAIN, 1).FakeQuantizeTernary(weight, axis=axis)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    BINARY: _binary,
    TERNARY: _ternary,
}  # for the exporter


def words() -> dict[str, str]:
    """A function of a file that unpacks weights -> what the weights are."""
    return {kind.function: kind.form.word for kind in KINDS.values()}


def fold_norms(model: Model) -> Model:
    """A model with low-bit weights without the batch norms that their scales and biases can hold;
    any other model as it is. Exact: signs and their scales follow the float weight."""
    if not any(node.target in TRANSLATIONS for node in model.graph.graph.nodes):
        return model
    folded = model.copy().eval()
    fold_batch_norm(folded.graph)
    return folded


def pack_weights(model: ir.Model) -> None:
    """Low-bit fake quantizers of weights become packed bytes and calls that unpack them."""
    graph, packed = model.graph, _Packed()
    for node in [n for n in graph if n.op_type in KINDS]:
        kind, made = KINDS[node.op_type], {}
        for user, position, order in list(_uses(node)):
            integer = user.op_type in WEIGHTED and _dequantizes(user.inputs[0])
            if (order, integer) not in made:
                stored = packed.call(graph, node, order)
                made[order, integer] = _scaled(graph, node, stored, order, integer)
            user.replace_input_with(position, made[order, integer])
        turned = [usage.node for usage in node.outputs[0].uses()]
        graph.remove([*turned, node], safe=True)
        _add_function(model, kind)


def _uses(node: ir.Node) -> Iterator[tuple[ir.Node, int, tuple[int, ...]]]:
    """Each op that reads the weight, at which place, and the order of axes it reads it in."""
    weight = tensor(node.inputs[0])
    assert weight is not None
    for user, position in node.outputs[0].uses():
        if user.op_type == "Transpose":
            order = tuple(attribute(user, "perm"))
            yield from ((u, p, order) for u, p in user.outputs[0].uses())
        else:
            yield user, position, tuple(range(weight.dim()))


@dataclass
class _Packed:
    """The packed weights of a file, each once: tied weights stay tied."""

    made: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)

    def call(self, graph: ir.Graph, node: ir.Node, order: tuple[int, ...]) -> ir.Value:
        """The unpacked integers of a weight, its axes in that order."""
        function, weight, name = KINDS[node.op_type].function, _read(node), _name(node, order)
        integers = weight.shaped().permute(order)
        data = weight.form.pack(integers).numpy()
        key = function, tuple(integers.shape), data.tobytes()
        if key not in self.made:
            stored = initializer(graph, f"{name}_packed", data)
            call = ir.node(function, [stored], {"shape": list(integers.shape)}, domain=DOMAIN)
            call.outputs[0].name = f"{name}_integers"
            self.made[key] = insert(graph, node, call)
        return self.made[key]


def _read(node: ir.Node) -> Rounded:
    """What a low-bit fake quantizer makes of its weight."""
    weight = tensor(node.inputs[0])
    assert weight is not None and node.inputs[0] is not None
    form, name = KINDS[node.op_type].form, str(node.inputs[0].name)
    return form.read(name, weight, attribute(node, "axis"))


def _name(node: ir.Node, order: tuple[int, ...]) -> str:
    """Of the weight with its axes in that order, in the file."""
    assert node.inputs[0] is not None
    return f"{node.inputs[0].name}{'' if list(order) == sorted(order) else '_t'}"


def _scaled(
    graph: ir.Graph, before: ir.Node, integers: ir.Value, order: tuple[int, ...], integer: bool
) -> ir.Value:
    """The weight: a product that folds away, or a dequantize op that an integer kernel takes in."""
    weight, name = _read(before), _name(before, order)
    scales, axis = weight.scales[:, 0], weight.axis  # (C,)
    if integer:  # a scale of 0 would divide the bias by 0; its channel's integers are zeros
        inputs = [
            integers,
            initializer(graph, f"{name}_scale", scales.where(scales > 0, 1.0).numpy()),
            initializer(graph, f"{name}_zero_point", np.zeros(len(scales), np.int8)),
        ]
        made = ir.node("DequantizeLinear", inputs, {"axis": order.index(axis)})
        made.outputs[0].name = f"{name}_dequantized"
        return insert(graph, before, made)
    wide = spread(scales, weight.weight, axis).permute(order).contiguous()
    scale = initializer(graph, f"{name}_scales", wide.numpy())
    alike = ir.node("CastLike", [integers, scale])
    alike.outputs[0].name = f"{name}_signs"
    made = ir.node("Mul", [insert(graph, before, alike), scale])
    made.outputs[0].name = f"{name}_scaled"
    return insert(graph, before, made)


def _dequantizes(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _add_function(model: ir.Model, kind: _Kind) -> None:
    function = onnx.parser.parse_function(kind.text)
    function.opset_import[0].version = model.opset_imports[""]
    made = ir.serde.deserialize_function(function)
    model.functions[made.identifier()] = made
