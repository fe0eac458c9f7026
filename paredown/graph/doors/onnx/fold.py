"""What follows from the file's own numbers alone is computed once, before anything runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.doors.onnx.call import Known, as_tensor
from paredown.graph.doors.onnx.module import Failed, compute
from paredown.graph.doors.onnx.ops import OPS
from paredown.graph.doors.onnx.program import Array, Node, Program, inner

LARGEST = 1 << 20  # numbers that a folded array may have, unless what it is made of has as many
# Ops that leave a weight what it is, so that it keeps its name.
SAME = frozenset({"Cast", "DequantizeLinear", "com.microsoft.DequantizeLinear"})
KEPT = frozenset({"If", "paredown.Recurrent", "paredown.Linear", "Dropout"})


def fold(program: Program) -> Program:
    """The program without the nodes that read known arrays alone, and without identities.

    Example:
        >>> node = Node("Add", ("a", "b"), ("c",), {}, "", 14)
        >>> known = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
        >>> fold(Program((node,), known, (), ("c",))).known
        {'c': array([2., 2.], dtype=float32)}
    """
    known, nodes = dict(program.known), []
    other: dict[str, str] = {}
    uses = program.uses()
    for node in program.nodes:
        node = _renamed(node, other)
        if node.op == "Identity" and node.outputs[0] not in program.outputs:
            other[node.outputs[0]] = node.inputs[0]
            continue
        made = _folded(node, known)
        if made is None:
            nodes.append(node)
            continue
        for name, array in zip(node.outputs, made, strict=False):
            source = node.inputs[0] if node.inputs else ""
            if node.op in SAME and uses[source] == 1 and name not in program.outputs:
                other[name], name = source, source
            known[name] = array
    return program.with_nodes(nodes, known)


def _renamed(node: Node, other: dict[str, str]) -> Node:
    if not other:
        return node
    attributes = {
        name: _inside(value, other) if isinstance(value, Program) else value
        for name, value in node.attributes.items()
    }
    inputs = tuple(other.get(name, name) for name in node.inputs)
    if inputs == node.inputs and not inner(node):
        return node
    return replace(node, inputs=inputs, attributes=attributes)


def _inside(program: Program, other: dict[str, str]) -> Program:
    nodes = tuple(_renamed(node, other) for node in program.nodes)
    outputs = tuple(other.get(name, name) for name in program.outputs)
    return replace(program, nodes=nodes, outputs=outputs)


def _folded(node: Node, known: dict[str, Array]) -> list[Array] | None:
    """The arrays that a node gives; None where it waits for others, or cannot be computed."""
    if node.op in KEPT or node.op not in OPS:
        return None
    if not all(name in known for name in node.inputs if name):
        return None
    values = tuple(Known(name, known[name]) if name else None for name in node.inputs)
    try:
        with torch.no_grad():
            made = compute(node, values, lambda each: as_tensor(each.array))
    except (UserError, Failed):
        return None  # told when it runs, if it does
    most = max([LARGEST, *(value.array.size for value in values if value is not None)])
    found = [_array(each) for each in made]
    if any(each is None or each.size > most for each in found):
        return None
    return [each for each in found if each is not None]


def _array(value: Any) -> Array | None:
    if isinstance(value, Tensor):
        return value.detach().contiguous().numpy() if value.dtype is not torch.bfloat16 else None
    if isinstance(value, Known):
        return value.array
    if isinstance(value, np.ndarray):
        return as_tensor(value).numpy()
    return None
