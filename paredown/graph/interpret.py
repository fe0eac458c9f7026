"""Run a graph a node at a time: look at its values on the way, or put others in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Note = Callable[[fx.Node, Any], None]
Rule = Callable[["Pass", fx.Node], Any]  # the value of a node, which `Pass.compute` gives


class Pass(fx.Interpreter):
    """A batch on its way through a graph; each value is freed after its last use.

    Run it whole, as often as one likes (`outputs`, or `run` as the caller's gradients are set), or
    in steps of one's own: `start`, then `step` and `forget` for each node in order. ``env`` holds
    the values that are still needed.

    Args:
        rule: asked for the value of each node, in place of `compute`.

    Example:
        >>> import paredown
        >>> model = paredown.capture(torch.nn.Sequential(torch.nn.ReLU()), (torch.zeros(1, 2),))
        >>> def doubled(run, node):
        ...     return run.compute(node) * (2 if node.name == "relu" else 1)
        >>> Pass(model.graph, doubled).outputs([torch.tensor([[-1.0, 2.0]])])
        [tensor([[0., 4.]])]
    """

    def __init__(self, graph: fx.GraphModule, rule: Rule | None = None) -> None:
        super().__init__(graph)
        self._rule = rule

    def run_node(self, n: fx.Node) -> Any:
        return self.compute(n) if self._rule is None else self._rule(self, n)

    def arguments(self, node: fx.Node) -> Arguments:
        """What the values before it give the node."""
        return self.fetch_args_kwargs_from_env(node)

    def compute(self, node: fx.Node, arguments: Arguments | None = None) -> Any:
        """What the node gives for its arguments, or for these."""
        args, kwargs = self.fetch_args_kwargs_from_env(node) if arguments is None else arguments
        return getattr(self, node.op)(node.target, args, kwargs)

    def outputs(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The outputs' tensors, without gradients, for the inputs in the graph's order."""
        with torch.no_grad():
            return list(self.run(*_copies(leaves)))

    def start(self, leaves: Sequence[Tensor]) -> Pass:
        """Ready to step through the graph with these inputs; returns itself."""
        self.env.clear()
        self.args_iter = iter(self.graph.process_inputs(*_copies(leaves)))
        return self

    def step(self, node: fx.Node) -> Any:
        self.env[node] = self.run_node(node)
        return self.env[node]

    def forget(self, node: fx.Node) -> None:
        """Free what ``node`` was the last to use."""
        for done in self.user_to_last_uses.get(node, []):
            del self.env[done]

    def fork(self, rule: Rule | None = None) -> Pass:
        """The same batch at the same node, to go on by another rule; what either then writes into
        its values does not reach the other's."""
        twin = copy.copy(self)
        twin._rule = rule
        twin.env = dict(self.env)
        if any(writes(node) for node in self.graph.nodes):
            held = [node for node in self.env if node.op != "get_attr"]
            values = copy.deepcopy([self.env[node] for node in held])  # views stay views of theirs
            twin.env |= dict(zip(held, values, strict=True))
        return twin

    def finish(self, node: fx.Node) -> list[Tensor]:
        """The outputs' tensors of a batch that has come as far as before this node.

        Example:
            >>> import paredown
            >>> model = paredown.capture(torch.nn.Sequential(torch.nn.ReLU()), (torch.zeros(1, 2),))
            >>> lane, nodes = Pass(model.graph).start([torch.ones(1, 2)]), model.graph.graph.nodes
            >>> first = next(iter(nodes))
            >>> _ = lane.step(first)
            >>> lane.fork(lambda run, node: run.compute(node)).finish(first.next)
            [tensor([[1., 1.]])]
        """
        while node.op != "output":
            self.step(node)
            self.forget(node)
            node = node.next
        return list(self.graph.process_outputs(self.step(node)))


def writes(node: fx.Node) -> bool:
    """Whether the op writes into one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _copies(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [leaf.clone() for leaf in leaves]  # an op may write into its input


def noting(note: Note, names: Collection[str] | None = None) -> Rule:
    """A rule that changes nothing: ``note`` is called with each node and its value, or with those
    of these names."""

    def rule(run: Pass, node: fx.Node) -> Any:
        value = run.compute(node)
        if names is None or node.name in names:
            note(node, value)
        return value

    return rule
