"""Weights with a scale for each output channel in an ONNX file: integers and a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import values as onnxscript_values

from paredown.graph.quantized.forms import Rounded, of_grid
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.targets.formats.onnx.bits import DOMAIN
from paredown.targets.formats.onnx.edit import SIGNED, attribute, initializer, insert, tensor

OP = "FakeQuantizeChannel"


def register() -> None:
    """The opaque op that carries the fake quantizer through the exporter's optimiser."""
    formal, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    onnx.defs.register_schema(
        OpSchema(
            OP,
            DOMAIN,
            1,
            inputs=[formal("x", "T"), formal("scale", "T")],
            outputs=[formal("y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
            attributes=[OpSchema.Attribute(key, kinds.INT, "") for key in ("axis", "low", "high")],
        )
    )


def _fake_quantize_channel(x: Any, scale: Any, axis: int, low: int, high: int) -> Any:
    op = onnxscript_values.Opset(DOMAIN, 1)
    return op.FakeQuantizeChannel(x, scale, axis=axis, low=low, high=high)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {PER_CHANNEL: _fake_quantize_channel}


def lower(graph: ir.Graph) -> None:
    """Weights behind a fake quantizer become integer initializers and a DequantizeLinear."""
    for node in [n for n in graph if n.op_type == OP]:
        weight = read(node)
        axis, name, scale = weight.axis, weight.name, weight.scales[:, 0].numpy()
        integers = weight.shaped().numpy().astype(SIGNED[weight.form.bits])
        for user in [usage.node for usage in node.outputs[0].uses()]:
            if user.op_type == "Transpose":
                order = list(attribute(user, "perm"))
                turned = np.ascontiguousarray(integers.transpose(order))
                made = dequantize(graph, user, f"{name}_t", turned, scale, order.index(axis))
                user.outputs[0].replace_all_uses_with(made)
                graph.remove(user, safe=True)
        if node.outputs[0].uses():
            made = dequantize(graph, node, name, integers, scale, axis)
            node.outputs[0].replace_all_uses_with(made)
        graph.remove(node, safe=True)


def read(node: ir.Node) -> Rounded:
    """What a fake quantizer of channels makes of its weight."""
    weight, scale = tensor(node.inputs[0]), tensor(node.inputs[1])
    assert weight is not None and scale is not None and node.inputs[0] is not None
    axis, low, high = (attribute(node, key) for key in ("axis", "low", "high"))
    form = of_grid(PER_CHANNEL, low, high)
    return form.read(str(node.inputs[0].name), weight, scale, axis, low, high)


def dequantize(
    graph: ir.Graph, before: ir.Node, name: str, integers: np.ndarray, scale: np.ndarray, axis: int
) -> ir.Value:
    stored = initializer(graph, f"{name}_quantized", integers)
    if integers.dtype == ml_dtypes.int4:  # int8 once a session has loaded it, with its kernels
        cast = ir.node("Cast", [stored], {"to": ir.DataType.INT8}, name=f"{name}_cast")
        stored = insert(graph, before, cast)
    inputs = [stored, initializer(graph, f"{name}_scale", scale.astype(np.float32))]
    if integers.dtype != np.int32:  # a matrix product fuses only with its zero points written out
        zeros = np.zeros(scale.shape, np.int8)
        inputs.append(initializer(graph, f"{name}_zero_point", zeros))
    node = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}_dequantize")
    node.outputs[0].name = f"{name}_dequantized"
    return insert(graph, before, node)
