"""Weights that exporters wrote twice: once as they are, and once turned for a product."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from paredown.graph.doors.onnx.program import Array, Node, Program

LEAST = 64  # numbers: fewer may be alike by chance


def tied(program: Program) -> tuple[Program, list[tuple[str, str]]]:
    """The program where a matrix of a product that is a table of embeddings too, number by number,
    is that table; and the names of both. Layers that began alike stay two."""
    tables = {node.inputs[0] for node in program.nodes if node.op == "Gather"}
    products = {node.inputs[1] for node in program.nodes if node.op == "paredown.Linear"}
    matrices = _matrices(program)
    first = {_key(array): name for name, array in matrices if name in tables}
    other = {
        name: first[_key(array)]
        for name, array in matrices
        if name in products - tables and _key(array) in first
    }
    if not other:
        return program, []
    nodes = [_with(node, other) for node in program.nodes]
    return program.with_nodes(nodes), list(other.items())


def _key(array: Array) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _matrices(program: Program) -> list[tuple[str, Array]]:
    """Those of the shapes and first numbers that another has too."""
    found = [
        (name, array)
        for name, array in program.known.items()
        if array.ndim == 2 and array.dtype.kind == "f" and array.size >= LEAST
    ]
    found = [(name, array) for name, array in found if array.flat[0] != array.flat[array.size // 2]]
    marks = [(array.shape, array.flat[0].item(), array.flat[-1].item()) for _, array in found]
    twice = [pair for pair, mark in zip(found, marks, strict=True) if marks.count(mark) > 1]
    return twice


def _with(node: Node, other: dict[str, str]) -> Node:
    return replace(node, inputs=tuple(other.get(name, name) for name in node.inputs))
