"""Run a graph on batches, with some of its quantizers passed by or some of its weights replaced."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.quantizers import quantizers, rounded
from paredown.graph.state import remove_state
from paredown.graph.values import refresh_values

Note = Callable[[fx.Node, Any], None]
Edge = tuple[str, str]  # a quantizer, and an op that reads what it is given instead


class Runner(fx.Interpreter):
    """A graph in evaluation mode; each weight is rounded once, not at every batch."""

    def __init__(self, graph: fx.GraphModule):
        super().__init__(graph)
        self.source = graph
        self._passed: Collection[str] = ()
        self._edges: Collection[Edge] = ()
        self._given: dict[fx.Node, Any] = {}  # to the quantizers of the edges
        self._weights: Mapping[str, Tensor] = {}
        self._note: Note | None = None
        self._rounded: dict[str, Tensor] = {}
        # an op that writes into its input must not reach the value before a quantizer passed by
        self._writes = any(_writes(node) for node in graph.graph.nodes)

    def outputs(
        self,
        leaves: Sequence[Tensor],
        passed: Collection[str] = (),
        weights: Mapping[str, Tensor] | None = None,
        note: Note | None = None,
        edges: Collection[Edge] = (),
    ) -> list[Tensor]:
        """The outputs' tensors.

        Args:
            leaves: the inputs, in the graph's order.
            passed: names of quantizers that give what they are given.
            weights: parameter name -> what stands there instead.
            note: called with every node and its value.
            edges: quantizers that are passed for one of their readers.
        """
        self._passed, self._weights, self._note = passed, weights or {}, note
        self._edges, self._given = edges, {}
        with torch.no_grad():
            found = list(self.run(*[leaf.clone() for leaf in leaves]))
        self._given = {}
        return found

    def run_node(self, n: fx.Node) -> Any:
        if any(n.name == quantizer for quantizer, _ in self._edges):
            self._given[n] = self.fetch_args_kwargs_from_env(n)[0][0]
        if n.name in self._passed:
            value: Any = self.fetch_args_kwargs_from_env(n)[0][0]
            value = value.clone() if self._writes else value
        elif form_of(n) is not None and _source(n) not in self._weights:
            value = self.weight(n)
        else:
            value = super().run_node(n)
        if self._note is not None:
            self._note(n, value)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """The arguments of an op, those of its edges as they were before they were rounded."""
        found = [q for q in n.all_input_nodes if (q.name, n.name) in self._edges]
        rounded_values = {q: self.env[q] for q in found}
        self.env |= {q: self._given[q] for q in found}
        try:
            return super().fetch_args_kwargs_from_env(n)
        finally:
            self.env |= rounded_values

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        found = self._weights.get(str(target))
        return super().get_attr(target, args, kwargs) if found is None else found

    def weight(self, quantizer: fx.Node) -> Tensor:
        """A weight as its quantizer gives it."""
        if quantizer.name not in self._rounded:
            self._rounded[quantizer.name] = rounded(self.source, quantizer)
        return self._rounded[quantizer.name]


def _source(quantizer: fx.Node) -> str:
    source = quantizer.args[0]
    return str(source.target) if isinstance(source, fx.Node) else ""


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def without_quantizers(model: Model) -> Model:
    """A copy whose values and weights are not rounded; its graph is ready for `find_regions`."""
    made = model.copy().eval()
    for node in quantizers(made.graph):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        made.graph.graph.erase_node(node)
        for arg in node.args[1:]:
            if isinstance(arg, fx.Node) and arg.op == "get_attr" and not arg.users:
                made.graph.graph.erase_node(arg)
                remove_state(made.graph, str(arg.target))
    made.graph.recompile()
    refresh_values(made)
    return made


def all_quantizers(graph: fx.GraphModule) -> set[str]:
    return {node.name for node in quantizers(graph)}
