"""An ONNX graph as plain data: nodes in the order they run, and what is known before they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from paredown.core.errors import UserError

Array: TypeAlias = np.ndarray[Any, Any]

HELPS = {
    "control": "export again with the loop unrolled, or the branch replaced by Where",
    "data": "export again with fixed sizes, or simplify the file (onnxslim, onnxsim) first",
    "custom": "export again without the custom op, or cut the file before it "
    "(onnx.utils.extract_model)",
    "other": "export again at another opset, or cut the file before it (onnx.utils.extract_model)",
}


@dataclass(frozen=True)
class Node:
    """One op of the graph.

    Attributes:
        op: ONNX's name; ops of other domains have theirs before it, such as "com.microsoft.Gelu",
            and those that the patterns make begin with "paredown.".
        inputs: names of values; "" where one is left out.
        attributes: plain Python values; arrays for tensors and `Program` for graphs.
        version: the opset of its domain.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    version: int = 0

    def told(self) -> str:
        """The node in a message: its name, or that of its first output, and its op."""
        name = self.name or next(filter(None, self.outputs), "")
        return f"node {name!r} ({self.op.removeprefix('paredown.')})"

    def refused(self, why: str, helps: str = "other") -> UserError:
        """The error that says why it cannot be taken.

        Example:
            >>> print(Node("Loop", (), ("y",)).refused("is control flow on data", "custom"))
            node 'y' (Loop): is control flow on data; what usually helps: export again without the \
custom op, or cut the file before it (onnx.utils.extract_model).
        """
        return UserError(f"{self.told()}: {why}; what usually helps: {HELPS[helps]}.")


@dataclass(frozen=True)
class Program:
    """Nodes in order, and the values that the file holds.

    Attributes:
        known: name -> array: initialisers, constants, and what follows from them alone.
        weights: those of ``known`` that are initialisers of the file.
    """

    nodes: tuple[Node, ...]
    known: Mapping[str, Array]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: Any) -> Program:
        return self  # nothing writes into it, and its arrays are as large as the model

    def producers(self) -> dict[str, Node]:
        """Name of a value -> the node that gives it."""
        return {name: node for node in self.nodes for name in node.outputs if name}

    def uses(self) -> Counter[str]:
        """Name of a value -> how often it is read, also as an output and inside branches."""
        found = Counter(self.outputs)
        for node in self.nodes:
            found.update(node.inputs)
            for graph in inner(node):
                found.update(graph.uses())
        return found

    def with_nodes(self, nodes: list[Node], known: Mapping[str, Array] | None = None) -> Program:
        """The same with other nodes, without those that nothing reads."""
        held = self.known if known is None else known
        made = replace(self, nodes=tuple(nodes), known=held)
        return made.without_unused()

    def without_unused(self) -> Program:
        """Without nodes and arrays that no output depends on."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted & set(node.outputs):
                wanted |= set(node.inputs)
                for graph in inner(node):
                    wanted |= set(graph.uses())
                kept.append(node)
        known = {name: array for name, array in self.known.items() if name in wanted}
        return replace(self, nodes=tuple(reversed(kept)), known=known)


def inner(node: Node) -> list[Program]:
    """The graphs within a node."""
    return [value for value in node.attributes.values() if isinstance(value, Program)]
