"""Run a graph on batches, with some of its quantizers passed by or some of its weights replaced."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.interpret import Arguments, Note, Pass, writes
from paredown.graph.model import Model
from paredown.graph.quantized.forms import form_of
from paredown.graph.quantized.quantizers import quantizers, rounded
from paredown.graph.state import remove_state
from paredown.graph.values import refresh_values

Edge = tuple[str, str]  # a quantizer, and an op that reads what it is given instead
KEPT_BYTES = 2**28  # of rounded weights


class Runner:
    """A graph in evaluation mode; weights are rounded once, not at every batch, as far as there is
    room for them."""

    def __init__(self, graph: fx.GraphModule):
        self.source = graph
        self._pass = Pass(graph, self._value)
        self._passed: Collection[str] = ()
        self._edges: Collection[Edge] = ()
        self._given: dict[fx.Node, Any] = {}  # to the quantizers of the edges
        self._weights: Mapping[str, Tensor] = {}
        self._note: Note | None = None
        self._rounded: dict[str, Tensor] = {}
        self._left = KEPT_BYTES
        # an op that writes into its input must not reach the value before a quantizer passed by
        self._writes = any(writes(node) for node in graph.graph.nodes)

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
        found = self._pass.outputs(leaves)
        self._given = {}
        return found

    def alone(
        self, leaves: Sequence[Tensor], groups: Mapping[str, Collection[str]]
    ) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """The outputs with every quantizer passed by, and with all but those of each group.

        What comes before the values that a group rounds is run once for all of them.
        """
        every = {node.name for node in quantizers(self.source)}
        self._passed, self._weights, self._note, self._edges = every, {}, None, ()
        starts, found = self._starts(groups), dict[str, list[Tensor]]()
        with torch.no_grad():
            main = self._pass.start(leaves)
            for node in self.source.graph.nodes:
                for name in starts.get(node, ()):
                    self._passed = every - set(groups[name])
                    lane = main.fork(self._value)
                    weights = [n for n in lane.env if n.name in groups[name] and form_of(n)]
                    lane.env |= {weight: self.weight(weight) for weight in weights}
                    found[name] = lane.finish(node)
                self._passed = every
                if node.op == "output":
                    break
                main.step(node)
                main.forget(node)
            return main.finish(node), found

    def _starts(self, groups: Mapping[str, Collection[str]]) -> dict[fx.Node, list[str]]:
        """The first node that a group's quantizers change, with the names of the groups: those of
        weights may stand anywhere before."""
        place = {node: number for number, node in enumerate(self.source.graph.nodes)}
        found: dict[fx.Node, list[str]] = {}
        for name, group in groups.items():
            own = [node for node in place if node.name in group]
            changed = [n for o in own for n in (o.users if form_of(o) is not None else [o])]
            found.setdefault(min(changed, key=place.__getitem__), []).append(name)
        return found

    def _value(self, run: Pass, node: fx.Node) -> Any:
        arguments = self._arguments(run, node)
        if any(node.name == quantizer for quantizer, _ in self._edges):
            self._given[node] = arguments[0][0]
        if node.name in self._passed:
            value: Any = arguments[0][0]
            value = value.clone() if self._writes else value
        elif form_of(node) is not None and _source(node) not in self._weights:
            value = self.weight(node)
        elif node.op == "get_attr" and str(node.target) in self._weights:
            value = self._weights[str(node.target)]
        else:
            value = run.compute(node, arguments)
        if self._note is not None:
            self._note(node, value)
        return value

    def _arguments(self, run: Pass, node: fx.Node) -> Arguments:
        """The arguments of an op, those of its edges as they were before they were rounded."""
        if not any(node.name == reader for _, reader in self._edges):
            return run.arguments(node)

        def value(source: fx.Node) -> Any:
            edge = (source.name, node.name) in self._edges
            return self._given[source] if edge else run.env[source]

        return fx.node.map_arg((node.args, node.kwargs), value)  # type: ignore[return-value]

    def weight(self, quantizer: fx.Node) -> Tensor:
        """A weight as its quantizer gives it."""
        made = self._rounded.get(quantizer.name)
        if made is None:
            made = rounded(self.source, quantizer)
            self._left -= made.nbytes
            if self._left >= 0:
                self._rounded[quantizer.name] = made
        return made


def _source(quantizer: fx.Node) -> str:
    source = quantizer.args[0]
    return str(source.target) if isinstance(source, fx.Node) else ""


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
