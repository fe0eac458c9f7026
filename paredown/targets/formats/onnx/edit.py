"""What edits of an ONNX graph share: constants, new nodes, attributes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

SIGNED = {8: np.dtype(np.int8), 4: np.dtype(ml_dtypes.int4)}  # bits -> what a file holds them in
UNSIGNED = {8: np.dtype(np.uint8), 4: np.dtype(ml_dtypes.uint4)}


def array(value: ir.Value | None) -> np.ndarray | None:
    """The constant an ONNX value holds, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    made = ir.val(name, const_value=ir.tensor(array, name=name))
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
