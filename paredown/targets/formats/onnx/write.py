"""Model -> ONNX file: export, integer weights and biases, nothing else in the file."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import values as onnxscript_values
from torch.export import ExportedProgram

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.graph.program import lowered
from paredown.graph.quantized.quantizers import PER_TENSOR, weight_forms
from paredown.targets.formats.onnx import (
    attention,
    bits,
    blocks,
    channels,
    dynamic,
    half,
    recurrent,
    shared,
)
from paredown.targets.formats.onnx.edit import array, attribute, initializer, insert, replace
from paredown.targets.formats.onnx.file import File
from paredown.targets.formats.onnx.rewriter import exact_rules, ops_read_once

MAX_BYTES = 2**31 - 1


def encode(model: Model, standard: bool = False) -> File:
    """The ONNX file; the same model gives the same bytes.

    Args:
        standard: with ONNX's own ops alone, and biases in float, for other runtimes than ONNX
            Runtime, whose kernels want the biases of integer layers as 32-bit integers.
    """
    _register_placeholders()
    exported = _export(attention.on_four_axes(shared.box(bits.fold_norms(model))))
    graph = exported.graph
    shared.unbox(graph)
    recurrent.lower(graph, standard)
    channels.lower(graph)
    _quantize_activations(graph)
    dynamic.lower(graph, standard)
    bits.pack_weights(exported)
    if not standard:
        _integer_biases(graph)
        half.widen_transposes(graph)
    blocks.lower(exported, standard)
    _pool_by_name(graph)
    RemoveUnusedNodesPass()(exported)
    _strip(exported)
    _name_dimensions(graph, model)
    if any(item.limits for item in model.inputs):
        # read by the predictor in paredown/targets/runtimes/onnxruntime.py
        exported.metadata_props["paredown.limits"] = json.dumps(
            [item.limits for item in model.inputs]
        )
    file = File.of(exported)
    if file.size_bytes > MAX_BYTES:
        raise UserError("model: its ONNX file would be above 2 GB, the most that ONNX can hold.")
    file.check()
    return file


@functools.cache
def _register_placeholders() -> None:
    """Opaque ops that carry the fake quantizers through the exporter's optimiser."""
    for each in (channels, blocks, dynamic, recurrent):
        each.register()
    kinds = OpSchema.AttrType
    shapes: dict[str, tuple[list[str], dict[str, Any]]] = {
        "FakeQuantize": (
            ["x"],
            {"scale": kinds.FLOAT, "zero_point": kinds.INT, "low": kinds.INT, "high": kinds.INT},
        ),
        "Keep": (["x"], {}),
        **dict.fromkeys(bits.KINDS, (["x"], {"axis": kinds.INT})),
    }
    for name, (inputs, attributes) in shapes.items():
        onnx.defs.register_schema(
            OpSchema(
                name,
                bits.DOMAIN,
                1,
                inputs=[OpSchema.FormalParameter(item, "T") for item in inputs],
                outputs=[OpSchema.FormalParameter("y", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
                attributes=[OpSchema.Attribute(key, kind, "") for key, kind in attributes.items()],
            )
        )


def _fake_quantize(x: Any, scale: float, zero_point: int, low: int, high: int) -> Any:
    op = onnxscript_values.Opset(bits.DOMAIN, 1)
    return op.FakeQuantize(x, scale=scale, zero_point=zero_point, low=low, high=high)


def _export(model: Model) -> ir.Model:
    outputs = structure.output_names(model.outputs)
    inputs = [item.name for item in model.inputs]
    clash = set(inputs) & set(outputs)
    outputs = [f"{name}_out" if name in clash else name for name in outputs]

    def write(program: ExportedProgram) -> Any:
        # Attention with a trainable bias decomposes to another layout where gradients are on.
        with _quiet(), exact_rules(), ops_read_once(), torch.no_grad():
            return torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_opset(model),
                optimize=True,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table={
                    PER_TENSOR: _fake_quantize,
                    **channels.TRANSLATIONS,
                    **recurrent.TRANSLATIONS,
                    **bits.TRANSLATIONS,
                    **blocks.TRANSLATIONS,
                    **dynamic.TRANSLATIONS,
                    **shared.TRANSLATIONS,
                },
            )

    try:
        return lowered(model, write).model  # type: ignore[no-any-return]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: cannot be written as ONNX: {_root_cause(error)}") from error


def _opset(model: Model) -> int | None:
    """Of the file: 4-bit tensors and blocks came with opset 21; else the exporter's usual."""
    forms = weight_forms(model.graph).values()
    return 21 if any(form.bits == 4 or form.alone for form in forms) else None


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter's chatter is about libraries that the user may not have."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0]


def _quantize_activations(graph: ir.Graph) -> None:
    for node in [n for n in graph if n.op_type == "FakeQuantize"]:
        value, name = node.inputs[0], str(node.outputs[0].name)
        kind = np.uint8 if attribute(node, "low") >= 0 else np.int8
        scale = initializer(graph, f"{name}_scale", np.array(attribute(node, "scale"), np.float32))
        zero = initializer(
            graph, f"{name}_zero_point", np.array(attribute(node, "zero_point"), kind)
        )
        quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize")
        quantize.outputs[0].name = f"{name}_quantized"
        quantized = insert(graph, node, quantize)
        dequantize = ir.node(
            "DequantizeLinear", [quantized, scale, zero], name=f"{name}_dequantize"
        )
        dequantize.outputs[0].name = f"{name}_dequantized"
        result = insert(graph, node, dequantize)
        replace(graph, node, result)
        graph.remove(node, safe=True)


def _integer_biases(graph: ir.Graph) -> None:
    """Biases become int32 with the product of input and weight scales: else nothing fuses."""
    for node in [n for n in graph if n.op_type in ("Conv", "Gemm") and len(n.inputs) > 2]:
        x, weight, bias = (
            value.producer() if value else None for value in (*node.inputs[:2], None)
        )
        values = array(node.inputs[2])
        if values is None or not _dequantizes(x) or not _dequantizes(weight):
            continue
        assert x is not None and weight is not None and node.inputs[2] is not None
        x_scale, weight_scale = array(x.inputs[1]), array(weight.inputs[1])
        assert x_scale is not None and weight_scale is not None
        if weight_scale.ndim == 0 or x_scale.ndim:
            continue
        scale = (x_scale * weight_scale).astype(np.float32)
        integers = np.clip(np.rint(values.astype(np.float64) / scale), -(2**31), 2**31 - 1)
        name = f"{node.inputs[2].name}_{node.name}"
        made = channels.dequantize(graph, node, name, integers.astype(np.int32), scale, 0)
        node.replace_input_with(2, made)


def _dequantizes(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _pool_by_name(graph: ir.Graph) -> None:
    """A mean over both image axes is a GlobalAveragePool, which has an integer kernel."""
    for node in [n for n in graph if n.op_type == "ReduceMean"]:
        source = node.inputs[0]
        axes = array(node.inputs[1]) if len(node.inputs) > 1 else None
        keeps = "keepdims" not in node.attributes or attribute(node, "keepdims") == 1
        rank = len(source.shape) if source is not None and source.shape is not None else 0
        if not rank and source is not None and _dequantizes(source.producer()):
            rank = _rank_through(source)
        if axes is not None and keeps and rank == 4 and sorted(int(a) % 4 for a in axes) == [2, 3]:
            made = ir.node("GlobalAveragePool", [source], name=node.name)
            made.outputs[0].name = f"{node.outputs[0].name}_pooled"
            result = insert(graph, node, made)
            node.outputs[0].replace_all_uses_with(result)
            graph.remove(node, safe=True)


def _rank_through(value: ir.Value) -> int:
    """The rank of a dequantized value: that of what was quantized."""
    dequantize = value.producer()
    quantize = dequantize.inputs[0].producer() if dequantize and dequantize.inputs[0] else None
    source = quantize.inputs[0] if quantize else None
    return len(source.shape) if source is not None and source.shape is not None else 0


def _strip(model: ir.Model) -> None:
    """Leave weights and graph: no source lines, shapes or documentation."""
    graph = model.graph
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "paredown", None
    model.doc_string = graph.doc_string = None
    graph.metadata_props.clear()
    if not model.functions:
        model.opset_imports.pop(bits.DOMAIN, None)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in [*graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
    for value in graph.initializers.values():
        value.metadata_props.clear()


def _name_dimensions(graph: ir.Graph, model: Model) -> None:
    """Dynamic dimensions carry the user's names instead of the exporter's symbols."""
    names: dict[str, str] = {}
    for value, item in zip(graph.inputs, model.inputs, strict=True):
        if value.shape is None:
            continue
        for dim, name in item.dynamic.items():
            size = value.shape[dim]
            if not isinstance(size, int):
                names.setdefault(str(size.value), name)
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            sizes = [
                s if isinstance(s, int) else names.get(str(s.value), s.value) for s in value.shape
            ]
            value.shape = ir.Shape(sizes)
