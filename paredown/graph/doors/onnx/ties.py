"""Weights that exporters wrote twice: once as they are, and once turned for a product."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from paredown.graph.doors.onnx.program import Array, Node, Program

LEAST = 64  # numbers: fewer may be alike by chance


def tied(program: Program) -> tuple[Program, list[tuple[str, str]]]:
    """The program where matrices that are alike, number by number, are one; and their names."""
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    other: dict[str, str] = {}
    for name, array in _matrices(program):
        key = array.shape, hashlib.sha256(array.tobytes()).digest()
        if first.setdefault(key, name) != name:
            other[name] = first[key]
    if not other:
        return program, []
    nodes = [_with(node, other) for node in program.nodes]
    return program.with_nodes(nodes), list(other.items())


def _matrices(program: Program) -> list[tuple[str, Array]]:
    """Those of the shapes and first numbers that another has too, largest names first."""
    found = [
        (name, array)
        for name, array in program.known.items()
        if array.ndim == 2 and array.dtype.kind == "f" and array.size >= LEAST
    ]
    found = [(name, array) for name, array in found if array.flat[0] != array.flat[array.size // 2]]
    marks = [(array.shape, array.flat[0].item(), array.flat[-1].item()) for _, array in found]
    twice = [pair for pair, mark in zip(found, marks, strict=True) if marks.count(mark) > 1]
    return sorted(twice, key=lambda pair: ("." not in pair[0], pair[0]))


def _with(node: Node, other: dict[str, str]) -> Node:
    return replace(node, inputs=tuple(other.get(name, name) for name in node.inputs))
