"""Which values of a graph stay float32 where the rest becomes 16 bits, and why.

A value stays where it leaves the range of the 16 bits on the data that was seen; so does what a
whole-number position is computed into, and what hangs on a number that 16 bits cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from paredown.graph.interpret import Pass
from paredown.graph.memory import aliases, marked
from paredown.graph.sites import CONVOLUTIONS
from paredown.graph.state import tensor_of

aten = torch.ops.aten
MARGIN = 2.0  # between the largest value seen and the largest that the 16 bits hold
_INDEXING = (
    *(aten.index.Tensor, aten.index_select.default, aten.gather.default),
    *(aten.embedding.default, aten.take.default, aten.take_along_dim.default),
)
# What gives on an operand as it is: a mask's huge number, a norm's tiny one.
_CARRIERS = {
    *(
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.clone.default,
    ),
    *(
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.expand.default,
        aten.expand_as.default,
    ),
    *(aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.slice.Tensor, aten.transpose.int, aten.permute.default, aten.cat.default),
}


_SCALING = {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor}  # by a number, not to a number
# Sums of products, which CPUs without 16-bit units take many times longer for in 16 bits.
_PRODUCTS = {
    *(*CONVOLUTIONS, aten.conv_transpose1d.default, aten.conv_transpose2d.input),
    *(aten.conv_transpose3d.input, aten.linear.default, aten.addmm.default, aten.mm.default),
    *(aten.matmul.default, aten.bmm.default, aten.baddbmm.default),
}


# --- what was seen ---------------------------------------------------------------------------


class Facts:
    """Runs a graph and notes, by node name, what holds float32, what whole numbers, and how large.

    It may run any number of times: ``largest`` is over all runs, infinities and NaN left out, and
    ``spoilt`` names the values that were ever not finite.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self.run = Pass(graph, self._value).run
        self.single: set[str] = set()
        self.whole: set[str] = set()
        self.largest: dict[str, float] = {}
        self.spoilt: set[str] = set()
        self.inner: dict[str, Facts] = {}  # of the graphs within the graph

    def _value(self, run: Pass, node: fx.Node) -> Any:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            args, _ = run.arguments(node)
            place = inner_graph(args)
            facts = self.inner.setdefault(node.name, Facts(args[place]))
            value = facts.run(*args[place + 1 :])
        elif node.target in _PRODUCTS:
            value = single_sums(node.target, *run.arguments(node))
        else:
            value = run.compute(node)
        self._look(node, [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)])
        return value

    def _look(self, n: fx.Node, tensors: list[Tensor]) -> None:
        if any(tensor.dtype == torch.float32 for tensor in tensors):
            self.single.add(n.name)
        elif tensors and not any(tensor.is_floating_point() for tensor in tensors):
            self.whole.add(n.name)
        for tensor in (t.detach() for t in tensors if t.is_floating_point()):
            drawn = tensor.numel() and "empty" not in str(n.target)  # which holds what lay there
            peak = float(tensor.abs().max()) if drawn else 0.0
            if not math.isfinite(peak):  # NaN too
                self.spoilt.add(n.name)
                peak = float(tensor.where(tensor.isfinite(), 0).abs().max())
            self.largest[n.name] = max(self.largest.get(n.name, 0.0), peak)


def single_sums(op: Any, args: Any, kwargs: Any) -> Tensor:
    """What an op that sums products of 16-bit numbers gives, its sums in float32.

    16-bit kernels sum in float32 and round once, so that both are the same to rounding; a sum
    beyond the range of the 16 bits becomes infinite in both.

    Example:
        >>> row = torch.full((1, 2), 300.0).half()
        >>> single_sums(aten.mm.default, (row, row.T), {})
        tensor([[inf]], dtype=torch.float16)
    """
    leaves = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        return op(*args, **kwargs)  # type: ignore[no-any-return]
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
    return op(*args, **kwargs).to(*dtypes)  # type: ignore[no-any-return]


def inner_graph(args: Any) -> int:
    """The place of a higher-order op's graph among its arguments."""
    return next(i for i, item in enumerate(args) if isinstance(item, fx.GraphModule))


# --- what leaves the range -------------------------------------------------------------------


def leaves_range(peak: float, dtype: torch.dtype) -> bool:
    """Whether a value whose largest magnitude is ``peak`` overflows in ``dtype``, or lies below its
    normal numbers, where digits are lost.

    Example:
        >>> [leaves_range(peak, torch.float16) for peak in (7e4, 4e4, 1.0, 1e-5, 0.0)]
        [True, True, False, True, False]
    """
    info = torch.finfo(dtype)
    return peak > info.max / MARGIN or 0 < peak < info.tiny * MARGIN


def out_of_range(graph: fx.GraphModule, facts: Facts, dtype: torch.dtype) -> set[fx.Node]:
    """The values that leave the range of ``dtype``: on the data seen, or, since a number written in
    the graph does, on other data, as a mask's -1e9 or a norm's 1e-12."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        carried = node.target in _CARRIERS and any(n in found for n in node.all_input_nodes)
        seen = node.name in facts.single and _matters(node, facts.largest.get(node.name, 0), dtype)
        written = node.target not in _SCALING and _needs_width(node, dtype)
        inner = facts.inner.get(node.name)
        inside = inner is not None and out_of_range(inner.graph, inner, dtype)
        if seen or inside or (node.name in facts.single and (carried or written)):
            found.add(node)
    return _with_memory(found)


def _matters(node: fx.Node, peak: float, dtype: torch.dtype) -> bool:
    """Whether a value out of range is worth float32: a tiny one is not where it is only added."""
    if not leaves_range(peak, dtype):
        return False
    return peak > 1 or not all(_adds(user, node) for user in node.users)


def _adds(user: fx.Node, node: fx.Node) -> bool:
    schema = getattr(user.target, "_schema", None)
    if user.target in (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor) or schema is None:
        return schema is not None
    roles = [a.name for a, given in zip(schema.arguments, user.args, strict=False) if given is node]
    return bool(roles) and set(roles) <= {"bias", "running_mean"}


def _with_memory(found: set[fx.Node]) -> set[fx.Node]:
    """And all that shares memory with what they, or their readers, write to: it is of one width."""
    while True:
        touched = found | {user for node in found for user in node.users}
        values = {value for node in touched for value in marked(node, True)}
        more = {other for value in values for other in aliases(value)} - found
        if not more:
            return found
        found |= more


def _needs_width(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a number is written in the node's arguments that ``dtype`` cannot hold."""
    return any(leaves_range(abs(number), dtype) for number in _numbers(node))


def _numbers(node: fx.Node) -> Iterator[float]:
    """The finite numbers written in a node's arguments, those of norms aside: kernels hold them."""
    schema = getattr(node.target, "_schema", None)
    named = zip([a.name for a in schema.arguments], node.args, strict=False) if schema else ()
    plain = {name: value for name, value in [*named, *node.kwargs.items()] if name != "eps"}
    for item in pytree.tree_leaves(plain):
        if isinstance(item, float) and math.isfinite(item):
            yield item


# --- the plan --------------------------------------------------------------------------------


@dataclass
class Plan:
    """The nodes that give float32 now, and those of them that stay so."""

    single: set[fx.Node]
    wide: set[fx.Node] = field(default_factory=set)
    kept: set[fx.Node] = field(default_factory=set)  # the values that are out of range
    inner: dict[str, Facts] = field(default_factory=dict)

    @staticmethod
    def of(
        graph: fx.GraphModule, facts: Facts, dtype: torch.dtype, also: frozenset[str] = frozenset()
    ) -> Plan:
        """What keeps values out of the range of ``dtype``, and those named in ``also``, float32: in
        what gives and in what reads them."""
        nodes = list(graph.graph.nodes)
        plan = Plan({n for n in nodes if n.name in facts.single}, inner=facts.inner)
        loose: set[fx.Node] = set()  # buffers and constants: as wide as what uses them
        for node in nodes:
            if node in plan.single and node.op not in ("placeholder", "output"):
                kind = plan._kind(graph, node, loose, facts)
                (plan.wide if kind == "wide" else loose if kind == "loose" else set()).add(node)
        plan.kept = out_of_range(graph, facts, dtype) | {n for n in nodes if n.name in also}
        forced = plan.kept | {n for n in plan.single if _needs_width(n, dtype)}
        forced |= {user for node in plan.kept for user in node.users if user.op != "output"}
        plan.wide |= forced
        for node in reversed(nodes):
            if node in plan.wide:
                plan.wide |= loose & set(node.all_input_nodes)
        reads = (n for n in nodes if n.op == "get_attr" and n in plan.single)
        plan.wide |= {n for n in reads if n.users and set(n.users) <= forced}
        return plan

    def _kind(self, graph: fx.GraphModule, node: fx.Node, loose: set[fx.Node], facts: Facts) -> str:
        if node.op == "get_attr":
            parameter = isinstance(tensor_of(graph, str(node.target)), nn.Parameter)
            return "narrow" if parameter else "loose"
        floats = [n for n in node.all_input_nodes if n in self.single]
        if any(n not in self.wide and n not in loose for n in floats):
            return "narrow"
        if any(n in self.wide for n in floats):
            return "wide"
        counts = any(n.name in facts.whole for n in node.all_input_nodes)
        if floats and node.target in _INDEXING:
            counts = False
        return "wide" if counts or "arange" in str(node.target) else "loose"

    def narrowed_outputs(self, graph: fx.GraphModule) -> list[bool]:
        (end,) = graph.graph.find_nodes(op="output")
        return [node in self.single and node not in self.wide for node in end.args[0]]
