"""Looking for a pattern: from its last node backwards, one value after another.

A pattern changes its last node alone; what only that one read goes by itself afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from paredown.graph.doors.onnx.program import Array, Node, Program

CLOSE = 1e-3  # of a number in a formula, beside its exact value


def about(found: float | None, wanted: float) -> bool:
    """Whether a number of a formula is this one, as exporters round it.

    Example:
        >>> about(0.70710677, 0.5**0.5), about(0.7, 0.5**0.5), about(None, 1.0)
        (True, False, False)
    """
    return found is not None and abs(found - wanted) <= CLOSE * abs(wanted)


@dataclass(frozen=True)
class Change:
    """What stands in place of a node, and arrays that are other than they were."""

    node: Node
    known: Mapping[str, Array] = field(default_factory=dict)
    before: tuple[Node, ...] = ()


@dataclass(frozen=True)
class View:
    """A program as patterns look at it."""

    program: Program
    makers: Mapping[str, Node]
    uses: Counter[str]

    @staticmethod
    def of(program: Program) -> View:
        return View(program, program.producers(), program.uses())

    def maker(self, name: str, *ops: str) -> Node | None:
        """The node that gives a value, where it is one of these ops."""
        node = self.makers.get(name)
        return node if node is not None and node.op in ops else None

    def known(self, name: str) -> Array | None:
        return self.program.known.get(name)

    def number(self, name: str) -> float | None:
        """A known value of one number."""
        array = self.known(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None

    def numbers(self, name: str) -> list[int] | None:
        array = self.known(name)
        return None if array is None else [int(each) for each in array.reshape(-1)]

    def other(self, node: Node, *ops: str) -> tuple[Node, str] | None:
        """Of a node with two operands: the one that one of these ops gives, and the other."""
        if len(node.inputs) != 2:
            return None
        for place in (0, 1):
            made = self.maker(node.inputs[place], *ops)
            if made is not None:
                return made, node.inputs[1 - place]
        return None

    def factors(self, name: str) -> tuple[float, list[str]]:
        """The numbers in a product of any depth as one, and its other factors, sorted."""
        number, found, left = 1.0, [], [name]
        while left:
            here = left.pop()
            value = self.number(here)
            node = self.maker(here, "Mul", "Div")
            if value is not None:
                number *= value
            elif node is not None and node.op == "Mul":
                left += node.inputs
            elif node is not None and self.number(node.inputs[1]):
                number /= self.number(node.inputs[1]) or 1.0
                left.append(node.inputs[0])
            else:
                found.append(here)
        return number, sorted(found)

    def plus(self, name: str) -> tuple[str, float] | None:
        """What a sum with a number is a sum of, and the number."""
        node = self.maker(name, "Add")
        if node is None:
            return None
        for place in (0, 1):
            value = self.number(node.inputs[place])
            if value is not None:
                return node.inputs[1 - place], value
        return None

    def axes(self, node: Node, since: int = 18) -> list[int] | None:
        """Those of a reduction."""
        if node.version >= since:
            return self.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
        found = node.attributes.get("axes")
        return None if found is None else list(found)


Pattern: TypeAlias = Callable[[View, Node], "Change | Node | None"]


def put_together(program: Program, patterns: Mapping[str, tuple[Pattern, ...]]) -> Program:
    """The program with each pattern's last node changed, until none is found any more.

    Args:
        patterns: the last node's op -> what may be found there.
    """
    for _ in range(8):
        view, known, nodes, found = View.of(program), dict(program.known), [], False
        for node in program.nodes:
            change = _first(view, node, patterns.get(node.op, ()))
            if change is None:
                nodes.append(node)
                continue
            found = True
            if isinstance(change, Node):
                nodes.append(change)
            else:
                nodes += [*change.before, change.node]
                known.update(change.known)
        if not found:
            return program
        program = program.with_nodes(nodes, known)
    return program


def _first(view: View, node: Node, patterns: tuple[Pattern, ...]) -> Change | Node | None:
    for pattern in patterns:
        try:
            found = pattern(view, node)
        except (IndexError, KeyError, ValueError):
            continue  # a node with fewer inputs than its op has, which is told when it runs
        if found is not None:
            return found
    return None


def same(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and bool(np.array_equal(a, b))
