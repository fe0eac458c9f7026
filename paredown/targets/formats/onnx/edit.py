"""What edits of an ONNX graph share: constants, new nodes, attributes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from paredown.graph.quantized.codes import to_bytes

SIGNED = {8: np.dtype(np.int8), 4: np.dtype(ml_dtypes.int4)}  # bits -> what a file holds them in
UNSIGNED = {8: np.dtype(np.uint8), 4: np.dtype(ml_dtypes.uint4)}


def array(value: ir.Value | None) -> np.ndarray | None:
    """The constant an ONNX value holds, or None."""
    if value is None or value.const_value is None:
        return None
    if isinstance(getattr(value.const_value, "raw", None), Tensor):
        raw = value.const_value.raw  # type: ignore[attr-defined]
        return type(value.const_value)(raw.detach().clone()).numpy()  # type: ignore[call-arg]
    return value.const_value.numpy()


def tensor(value: ir.Value | None) -> Tensor | None:
    """The same as a tensor, to be read alone: it may be the model's own."""
    raw = getattr(value.const_value, "raw", None) if value is not None else None
    if isinstance(raw, Tensor):
        return raw.detach()
    found = array(value)
    return None if found is None else torch.from_numpy(found.copy())


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The value of that name, which holds the array where it is not there yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    held: ir.TensorProtocol = ir.tensor(array, name=name)
    if held.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        codes = torch.from_numpy(array.reshape(-1).view(np.uint8) & 15)
        packed = to_bytes(codes, 4).numpy()
        held = ir.PackedTensor(packed, held.dtype, shape=array.shape, name=name)
    made = ir.val(name, const_value=held)
    graph.register_initializer(made)
    return made


def insert(graph: ir.Graph, before: ir.Node, node: ir.Node) -> ir.Value:
    return insert_all(graph, before, node)[0]


def insert_all(graph: ir.Graph, before: ir.Node, node: ir.Node) -> list[ir.Value]:
    """All that the node makes."""
    graph.insert_before(before, node)
    return list(node.outputs)


def attribute(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def replace(graph: ir.Graph, node: ir.Node, made: ir.Value) -> None:
    """Let all that reads the node's output read another value; one that leaves the graph hands
    its name on."""
    replace_value(graph, node.outputs[0], made)


def replace_value(graph: ir.Graph, old: ir.Value, made: ir.Value) -> None:
    """The same for one output of several."""
    for index, output in enumerate(graph.outputs):
        if output is old:
            made.name, old.name = output.name, f"{output.name}_replaced"
            made.shape, made.type = output.shape, output.type
            graph.outputs[index] = made
    old.replace_all_uses_with(made)
