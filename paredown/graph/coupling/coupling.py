"""Which dimensions of which tensors must be cut together.

One walk over the graph gives every index of every parameter a label, and merges the labels that
an op ties (see `rules`). What carries one label is a unit: a channel, a neuron, a head. Units
with the same kinds of members are a group, of which any can be cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph.coupling.groups import Group, Tensors, groups_of
from paredown.graph.coupling.labels import Result, Term, Value, Walk, shape_of
from paredown.graph.coupling.rules import rule_of
from paredown.graph.coupling.rules.common import unknown
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.graph.values import has_values, values_of

# group name -> (units,) bool: True for the units that stay. A group that is not named stays whole.
Choice = dict[str, np.ndarray]
ATTENTION = ("heads", "head_dim")
GROUP_NORM = ("groups", "within")
_FAILURES = (KeyError, IndexError, ValueError, TypeError, AssertionError, AttributeError)


@dataclass(frozen=True)
class Costs:
    """Of a whole model at its example inputs."""

    parameters: int
    macs: int  # multiply-adds
    size_bytes: int  # of parameters and buffers, as they are stored


@dataclass(frozen=True)
class Coupling:
    """What `analyze` finds in a model.

    Attributes:
        groups: what can be cut, in the order of their first parameters.
        coverage: the share of the weights of convolutions, linear layers, embeddings and
            recurrent layers that have a dimension which can be cut.
        pinned_by: why dimensions stay whole: op or reason -> how many indices it has pinned.
        unknown: names of ops that no rule covers; what they touch is pinned.
    """

    groups: tuple[Group, ...]
    coverage: float
    pinned_by: dict[str, int]
    unknown: tuple[str, ...]
    values: dict[str, Value | list[Value | None]] = field(repr=False)  # node -> labels as roots
    tensors: tuple[Tensors, ...] = field(repr=False)
    terms: tuple[Term, ...] = field(repr=False)
    units: dict[str, np.ndarray] = field(repr=False)  # group -> (units,) roots
    whole: frozenset[str] = field(repr=False)  # the nodes of those ops, which no cut rewrites
    never_zero: frozenset[tuple[str, int]] = field(repr=False)
    labels: int = field(repr=False)
    scale: float = field(repr=False)  # of the example's batch to the one that was walked

    def alive(self, choice: Choice) -> np.ndarray:
        """(labels,) bool: which roots stay.

        Raises:
            UserError: an unknown group, a wrong number of units, or a group that would vanish.
        """
        alive = np.ones(self.labels, dtype=bool)
        for name, kept in choice.items():
            if name not in self.units:
                raise UserError(f"choice: no group is called {name!r}.")
            if kept.shape != self.units[name].shape:
                raise UserError(
                    f"choice: group {name!r} has {len(self.units[name])} units, got {kept.shape}."
                )
            if not kept.any():
                raise UserError(f"group {name!r} would vanish: keep at least one unit of it.")
            alive[self.units[name]] = kept
        return alive

    def costs(self, choice: Choice | None = None) -> Costs:
        """What the model costs with that choice cut."""
        alive = self.alive(choice or {})
        parameters = size = 0
        for tensor in self.tensors:
            count = 1
            for full, roots in zip(tensor.shape, tensor.roots, strict=True):
                count *= full if roots is None else int(alive[roots].sum())
            parameters += count * tensor.trains
            size += count * tensor.item_bytes
        macs = 0
        for term in self.terms:
            count = term.constant
            for roots in term.labels:
                count *= int(alive[roots].sum())
            macs += count
        return Costs(parameters, round(macs * self.scale), size)

    def explain(self, name: str) -> list[str]:
        """For each dimension of a parameter, in a sentence: its group, or that it is pinned.

        Raises:
            UserError: no such parameter; suggests the nearest.
        """
        tensor = next((t for t in self.tensors if t.name == name), None)
        if tensor is None:
            near = difflib.get_close_matches(name, [t.name for t in self.tensors], 1, 0.0)
            raise UserError(f"no parameter is called {name!r}; did you mean {near[0]!r}?")
        lines = []
        for dim, size in enumerate(tensor.shape):
            groups = [g for g in self.groups for m in g.members if (m.name, m.dim) == (name, dim)]
            told = ", ".join(f"group {g.name!r} ({g.size} units)" for g in groups)
            lines.append(f"dimension {dim} of {size}: {told or 'stays whole'}")
        return lines


def analyze(model: Model, attention: str = "heads", group_norm: str = "groups") -> Coupling:
    """What can be cut from a model, and what goes with it; no model code is looked at.

    Args:
        attention: "heads" cuts whole heads, "head_dim" the same dimensions of every head.
        group_norm: "groups" cuts whole groups of a group norm, which is exact; "within" thins
            every group alike, which is finer and not exact.

    Raises:
        UserError: a policy that does not exist.

    Example:
        >>> import torch, paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = analyze(paredown.capture(net, (torch.zeros(1, 4),)))
        >>> [(g.name, g.size, g.exact, len(g.members)) for g in found.groups]
        [('0', 8, True, 3)]
    """
    for name, value, known in (
        ("attention", attention, ATTENTION),
        ("group_norm", group_norm, GROUP_NORM),
    ):
        if value not in known:
            raise UserError(f"{name}: expected {' or '.join(map(repr, known))}, got {value!r}.")
    if not has_values(model):
        values = values_of(model)
        model = model.copy()
        for node in model.graph.graph.nodes:
            node.meta["val"] = values[node.name]
    walk = Walk(attention, group_norm)
    parameters: dict[int, tuple[fx.Node, Value]] = {}
    unknowns: dict[str, str] = {}
    for node in model.graph.graph.nodes:
        walk.node = node
        walk.values[node] = _walked(model.graph, walk, node, parameters, unknowns)
    walk.node = None
    walk.settle()
    return _collect(model, walk, parameters, unknowns)


def _walked(
    graph: fx.GraphModule,
    walk: Walk,
    node: fx.Node,
    parameters: dict[int, tuple[fx.Node, Value]],
    unknowns: dict[str, str],
) -> Result:
    if node.op == "placeholder":
        return Value(shape_of(node.meta["val"]))
    if node.op == "get_attr":
        return _parameter(graph, walk, node, parameters)
    if node.op == "output":
        walk.pin_all(walk.tensors(node), "it is an output of the model")
        return None
    rule = rule_of(node)
    if rule.propagate is unknown:
        unknowns[node.name] = str(node.target)
    try:
        return rule.propagate(walk, node)
    except _FAILURES:  # a form of the op that its rule does not foresee: safe, and told
        unknowns[node.name] = str(node.target)
        return unknown(walk, node)


def _parameter(
    graph: fx.GraphModule, walk: Walk, node: fx.Node, found: dict[int, tuple[fx.Node, Value]]
) -> Result:
    """Tied parameters are one value."""
    owner = graph
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    if not isinstance(owner, Tensor):
        return None  # the subgraph of a higher-order op
    if id(owner) not in found:
        value = walk.fresh(tuple(owner.shape), range(owner.dim()), constant=True)
        found[id(owner)] = (node, value)
    return found[id(owner)][1]


# --- what was found --------------------------------------------------------------------------


def _collect(
    model: Model,
    walk: Walk,
    parameters: dict[int, tuple[fx.Node, Value]],
    unknowns: dict[str, str],
) -> Coupling:
    tensors = _tensors(model, walk, parameters)
    groups, units = groups_of(model, walk, tensors)
    values = {node.name: _rooted(walk, value) for node, value in walk.values.items()}
    free = np.zeros(walk.labels.count, dtype=bool)
    for roots in units.values():
        free[roots] = True
    pinned: dict[str, int] = {}
    for labels, why in walk.pins:
        pinned[why] = pinned.get(why, 0) + len(labels)
    return Coupling(
        groups=groups,
        coverage=_coverage(model, tensors, free),
        pinned_by=pinned,
        unknown=tuple(dict.fromkeys(unknowns.values())),
        whole=frozenset(unknowns),
        values=values,
        tensors=tensors,
        terms=tuple(
            Term(t.constant, tuple(walk.labels.find(each) for each in t.labels)) for t in walk.terms
        ),
        units=units,
        never_zero=frozenset((str(node.target), dim) for node, dim in walk.never_zero),
        labels=walk.labels.count,
        scale=_scale(model),
    )


def _scale(model: Model) -> float:
    """Of the example's batch to the one in the graph's values, which is 2 where that is 1."""
    for node, item in zip(
        (n for n in model.graph.graph.nodes if n.op == "placeholder"), model.inputs, strict=True
    ):
        shape = shape_of(node.meta["val"])
        if 0 in item.dynamic and shape and shape[0]:
            return len(item.example) / shape[0]
    return 1.0


def _tensors(
    model: Model, walk: Walk, parameters: dict[int, tuple[fx.Node, Value]]
) -> tuple[Tensors, ...]:
    """Every parameter and buffer once, under its first name; those no op reads stay whole."""
    found, seen = [], set()
    named = [*model.graph.named_parameters(), *model.graph.named_buffers()]
    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        value = parameters[id(tensor)][1] if id(tensor) in parameters else Value(())
        blocks = [value.block(axis) for axis in range(tensor.dim())]
        roots = [None if b is None else walk.labels.find(b.labels) for b in blocks]
        trains = isinstance(tensor, torch.nn.Parameter)
        found.append(
            Tensors(name, tuple(tensor.shape), tuple(roots), trains, tensor.element_size())
        )
    return tuple(found)


def _rooted(walk: Walk, value: Result) -> Value | list[Value | None]:
    if isinstance(value, list):
        return [_rooted(walk, each) for each in value]  # type: ignore[misc]
    if value is None:
        return []
    blocks = tuple(type(b)(b.axes, walk.labels.find(b.labels)) for b in value.blocks)
    return Value(value.shape, tuple(b for b in blocks if b.labels.any()), value.constant)


def _coverage(model: Model, tensors: tuple[Tensors, ...], free: np.ndarray) -> float:
    """The share of weights that a cut in some group can remove."""
    weights = set(_weights(model.graph))
    total = covered = 0.0
    for tensor in tensors:
        if tensor.name in weights:
            shares = [float(free[r].mean()) for r in tensor.roots if r is not None]
            total += np.prod(tensor.shape)
            covered += float(np.prod(tensor.shape)) * max(shares, default=0.0)
    return covered / total if total else 0.0


def _weights(graph: fx.GraphModule) -> Iterator[str]:
    first = {id(tensor): name for name, tensor in graph.named_parameters()}
    for site in sites(graph):
        tensor = tensor_of(graph, site.weight)
        if id(tensor) in first:
            yield first[id(tensor)]
