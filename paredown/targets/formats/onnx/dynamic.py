"""Dynamic quantization in an ONNX file: values become integers at each inference, by their range.

ONNX Runtime merges the ops that are written here, a DynamicQuantizeLinear and a MatMulInteger with
its scales and bias, into one DynamicQuantizeMatMul, or into one MatMulIntegerToFloat for each of
several products that read the same integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.defs import OpSchema
from onnxscript import values as onnxscript_values

from paredown.graph.quantized.quantizers import DYNAMIC
from paredown.targets.formats.onnx.bits import DOMAIN
from paredown.targets.formats.onnx.edit import array, attribute, initializer, insert, replace

OP = "FakeQuantizeDynamic"


def register() -> None:
    """The opaque op that carries the fake quantizer through the exporter's optimiser."""
    formal, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    onnx.defs.register_schema(
        OpSchema(
            OP,
            DOMAIN,
            1,
            inputs=[formal("x", "T")],
            outputs=[formal("y", "T")],
            type_constraints=[("T", ["tensor(float)"], "")],
            attributes=[OpSchema.Attribute(key, kinds.INT, "") for key in ("low", "high")],
        )
    )


def _fake_quantize_dynamic(x: Any, low: int, high: int) -> Any:
    op = onnxscript_values.Opset(DOMAIN, 1)
    return op.FakeQuantizeDynamic(x, low=low, high=high)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {DYNAMIC: _fake_quantize_dynamic}  # for the exporter


def lower(graph: ir.Graph, standard: bool = False) -> None:
    """Products of dynamically quantized values with integer weights become MatMulInteger.

    Args:
        standard: for other runtimes than ONNX Runtime, which round by themselves what comes to
            integer weights: their values stay in float.
    """
    for node in [n for n in graph if n.op_type == OP]:
        if standard:
            assert node.inputs[0] is not None
            replace(graph, node, node.inputs[0])
            graph.remove(node, safe=True)
            continue
        quantize = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
        for value, part in zip(quantize.outputs, ("quantized", "scale", "zero_point"), strict=True):
            value.name = f"{node.outputs[0].name}_{part}"
        graph.insert_before(node, quantize)
        for reader in [usage.node for usage in node.outputs[0].uses()]:
            if _is_product(reader, node.outputs[0]):
                _multiply(graph, reader, quantize)
        if node.outputs[0].uses() or node.outputs[0].is_graph_output():
            made = ir.node("DequantizeLinear", quantize.outputs)
            replace(graph, node, insert(graph, node, made))
        graph.remove(node, safe=True)


def _is_product(node: ir.Node, value: ir.Value) -> bool:
    """A plain product of the value with an integer weight (K, N), or (N, K) turned by a Gemm."""
    weight = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] else None
    if node.op_type not in ("MatMul", "Gemm") or node.inputs[0] is not value or weight is None:
        return False
    options = {key: attribute(node, key) for key in node.attributes}
    plain = not options.get("transA") and {options.get(k, 1.0) for k in ("alpha", "beta")} == {1.0}
    held = array(weight.inputs[0]) if weight.op_type == "DequantizeLinear" else None
    return plain and held is not None and held.dtype == np.int8 and held.ndim == 2


def _multiply(graph: ir.Graph, node: ir.Node, quantize: ir.Node) -> None:
    weight = node.inputs[1].producer()  # type: ignore[union-attr]
    assert weight is not None and weight.inputs[0] is not None
    held, scales = array(weight.inputs[0]), array(weight.inputs[1])  # (K, N) or (N, K), (N,)
    assert held is not None and scales is not None
    name, columns = str(weight.inputs[0].name), weight.inputs[0]
    if "transB" in node.attributes and attribute(node, "transB"):
        columns = initializer(graph, f"{name}_columns", np.ascontiguousarray(held.T))
    zeros = initializer(graph, "weight_zero_point", np.zeros((), np.int8))
    values, scale, zero_point = quantize.outputs
    product = ir.node("MatMulInteger", [values, columns, zero_point, zeros])
    total = ir.node("Cast", [insert(graph, node, product)], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [scale, initializer(graph, f"{name}_scales", scales)])
    made = ir.node("Mul", [insert(graph, node, total), insert(graph, node, both)])
    result = insert(graph, node, made)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = insert(graph, node, ir.node("Add", [result, node.inputs[2]]))
    replace(graph, node, result)
    graph.remove(node, safe=True)
    if not weight.outputs[0].uses():
        graph.remove(weight, safe=True)
