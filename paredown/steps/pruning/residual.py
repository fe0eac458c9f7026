"""Residual branches ``x + f(x)``: find them, name what goes together, and cut it out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import keep_meta
from paredown.graph.memory import aliases, marked, remove_unread, sweep, users_after
from paredown.graph.mode import is_counter
from paredown.graph.model import Model
from paredown.graph.names import classes, common, module_path, read_by, repeated
from paredown.graph.sites import sites
from paredown.graph.state import getattr_or_none

aten = torch.ops.aten


# --- residual branches -----------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """One ``x + f(x)``: the addition, and which of its two operands is x."""

    add: fx.Node
    place: int

    @property
    def shortcut(self) -> fx.Node:
        found: Any = self.add.args[self.place]
        assert isinstance(found, fx.Node)
        return found

    @property
    def inner(self) -> fx.Node:
        found: Any = self.add.args[1 - self.place]
        assert isinstance(found, fx.Node)
        return found


def branches(graph: fx.GraphModule) -> list[Branch]:
    """Every addition whose one operand has the result's shape and leads to the other operand.

    Also the second of ``x + f(x) + g(x)``, whose shortcut is itself a residual addition.

    Example:
        >>> import paredown
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x).relu()
        >>> model = paredown.capture(Net(4, 4), (torch.zeros(1, 4),))
        >>> [(branch.shortcut.name, branch.inner.name) for branch in branches(model.graph)]
        [('tensors_0', 'relu')]
    """
    above: dict[fx.Node, int] = {}  # a bit for each node that leads to this one, and its own
    bit: dict[fx.Node, int] = {}
    found: dict[fx.Node, Branch] = {}
    for index, node in enumerate(graph.graph.nodes):
        bit[node] = above[node] = 1 << index
        for operand in node.all_input_nodes:
            above[node] |= above[operand]
        for branch in _readings(node):
            leads = any(above[branch.inner] & bit[x] for x in _sources(branch, found))
            if leads and node not in found:
                found[node] = branch
    return list(found.values())


_SAME_VALUES = frozenset(
    {
        *("aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous", "aten::dropout"),
        *("aten::view", "aten::reshape", "aten::permute", "aten::transpose", "aten::flatten"),
    }
)


def _sources(branch: Branch, known: dict[fx.Node, Branch]) -> set[fx.Node]:
    """The x of ``x + f(x)``: under another dtype or shape too, and that of ``x + f(x) + g(x)``."""
    node = branch.shortcut
    found = {node}
    while getattr(getattr(node.target, "_schema", None), "name", "") in _SAME_VALUES:
        node = node.all_input_nodes[0]
        found.add(node)
    return found | ({known[node].shortcut} if node in known else set())


def _readings(node: fx.Node) -> list[Branch]:
    """The one or two ways to read an addition as ``x + f``, by shapes and dtypes alone."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs or is_counter(node):
        return []
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return []
    shape, both = form(node), [Branch(node, place) for place in (0, 1)]
    fitting = [b for b in both if shape is not None and form(b.shortcut) == shape]
    return [b for b in fitting if not _is_reused(b)]


def form(node: fx.Node) -> tuple[str, torch.dtype] | None:
    """Shape (with symbols for what is dynamic) and dtype of a value, if it is one tensor."""
    value = node.meta.get("val")
    return (str(tuple(value.shape)), value.dtype) if isinstance(value, Tensor) else None


def _is_reused(branch: Branch) -> bool:
    """Whether the sum is written over f(x), which then is read as the sum under its own name."""
    written = branch.inner in marked(branch.add, True)
    own = aliases(branch.inner, without=branch.add)
    return written and any(users_after(own, branch.add))


def cut(graph: fx.Graph, branch: Branch) -> None:
    """Put x in the place of ``x + f(x)`` and erase what only f(x) needed."""
    shortcut, add = branch.shortcut, branch.add
    same_memory = shortcut in marked(add, True)
    with graph.inserting_before(add):
        kept = graph.call_function(aten.clone.default, (shortcut,))
    keep_meta(kept, add)
    add.replace_all_uses_with(kept)
    graph.erase_node(add)
    for user in list(kept.users):
        if _repeats(user, shortcut):
            user.replace_all_uses_with(kept)
            graph.erase_node(user)
    later = users_after(aliases(kept) | aliases(shortcut), kept)
    if same_memory or not any(marked(user, True) for user in later):
        kept.replace_all_uses_with(shortcut)  # the copy is needed only where one is written to
        graph.erase_node(kept)
    sweep(graph)


_IDEMPOTENT: dict[Any, str] = {
    **dict.fromkeys((aten.relu.default, aten.relu_.default), "relu"),
    **dict.fromkeys((aten.relu6.default, aten.relu6_.default), "relu6"),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default), "hardtanh"),
}


def _repeats(user: fx.Node, value: fx.Node) -> bool:
    """Whether the op does again what made the value: relu(relu(x)) is relu(x).

    Not where one of the two is written to later: then they are not the same.
    """
    name = _IDEMPOTENT.get(user.target)
    if name is None or name != _IDEMPOTENT.get(value.target) or user.args[1:] != value.args[1:]:
        return False
    later = users_after(aliases(user) | aliases(value), value)
    return not any(marked(other, True) for other in later if other is not user)


# --- units: what is removed together ---------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """Branches that go together, by the user's name, and all that goes with them."""

    name: str
    branches: tuple[Branch, ...]
    lost: frozenset[fx.Node]
    weights: frozenset[str]


def units(graph: fx.GraphModule, by: str) -> list[Unit]:
    """What can be removed: single branches, or all those of one repeated module of the user's.

    Args:
        by: "branch", or "block": the deepest item of a list of modules of one class that holds a
            branch's weights (``layers.3``), else a module numbered in its name (``layer3``).
            Where there is neither, branches stay apart. A module is a unit each time it runs.
    """
    kinds, known = classes(graph), {branch.add: branch for branch in branches(graph)}
    groups: list[tuple[str, list[Branch], set[str]]] = []
    for branch in known.values():
        gone = lost(graph, (branch,))
        weights, below = _weights(graph, gone), _below(graph, branch, gone, known)
        if branch.inner not in below or (not weights and all(map(_is_pointwise, gone))):
            continue  # such as an activation's x + 0.04 x^3
        paths = [module_path(node, kinds) for node in _reading(graph, gone, below)]
        path = common(paths)
        ends = [path for path in (paths[0], paths[-1]) if path]
        home = repeated(path, kinds) if by == "block" else None
        last = next((g for g in reversed(groups) if home and g[0] == home), None)
        if last is None or (last[2] & weights and not all(b.add in gone for b in last[1])):
            groups.append((home or path or "..".join(ends) or branch.add.name, [branch], weights))
        else:
            last[1].append(branch)
            last[2].update(weights)
    return list(_named(graph, groups))


def _named(
    graph: fx.GraphModule, groups: list[tuple[str, list[Branch], set[str]]]
) -> Iterator[Unit]:
    """The groups that have weights and can go as a whole; a name that comes again is numbered."""
    used: dict[str, int] = {}
    for name, group, weights in groups:
        gone = lost(graph, group) if weights else frozenset()
        if gone:
            used[name] = used.get(name, 0) + 1
            full = name if used[name] == 1 else f"{name} (use {used[name]})"
            yield Unit(full, tuple(group), gone, frozenset(_weights(graph, gone)))


def lost(graph: fx.GraphModule, group: Sequence[Branch]) -> frozenset[fx.Node]:
    """The nodes that go with these branches; none where the model would not be one any more.

    That is where all weights would go, or an input would not be read any more.
    """
    copied, place = _without(graph, group)
    alive = set(copied.nodes)
    gone = frozenset(old for old, new in place.items() if new not in alive)
    inputs = [node for node in place if node.op == "placeholder" and node.users]
    whole = all(place[node].users for node in inputs)
    return gone if whole and any(site.node not in gone for site in sites(graph)) else frozenset()


def _weights(graph: fx.GraphModule, nodes: Set[fx.Node]) -> set[str]:
    """The weights that these nodes use: those of sites, and matrices that an op computes with."""
    found = {site.weight for site in sites(graph) if site.node in nodes}
    return found | {str(node.target) for node in nodes if _is_matrix(graph, node)}


def _is_matrix(graph: fx.GraphModule, node: fx.Node) -> bool:
    """A standardised or reparameterised weight has no site, and a layer's scale is no weight."""
    value = getattr_or_none(graph, str(node.target)) if node.op == "get_attr" else None
    return isinstance(value, torch.nn.Parameter) and sum(size > 1 for size in value.shape) > 1


def _is_pointwise(node: fx.Node) -> bool:
    return node.op != "call_function" or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _below(
    graph: fx.GraphModule, branch: Branch, gone: Set[fx.Node], known: dict[fx.Node, Branch]
) -> set[fx.Node]:
    """What x leads to, but not by way of another residual addition that would stay.

    Attention scores, to which each layer adds one positional bias, are no branch of that bias,
    although its use in the layer before leads to them.
    """
    below = _sources(branch, known)
    for node in graph.graph.nodes:
        passes = node in gone or node not in known
        if passes and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    return below


def _reading(graph: fx.GraphModule, gone: Set[fx.Node], below: Set[fx.Node]) -> list[fx.Node]:
    """The ops of a branch that use its weights, or where it has none, all of them, in order.

    Those between x and f(x), if there are any: an encoder that only this branch reads goes with
    it, but is not part of it.
    """
    reading = {site.node for site in sites(graph)}
    reading |= {user for node in gone if _is_matrix(graph, node) for user in node.users}
    chosen = gone & reading & below or gone & reading or gone & below
    return [node for node in graph.graph.nodes if node in chosen]


def _without(
    graph: fx.GraphModule, group: Sequence[Branch]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph without these branches, and node -> its copy, erased or not."""
    copied, place = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.output(copied.graph_copy(graph.graph, place))  # type: ignore[arg-type]
    _cut_all(copied, [Branch(place[branch.add], branch.place) for branch in group])
    return copied, place


def _cut_all(graph: fx.Graph, group: Sequence[Branch]) -> None:
    for branch in reversed(group):  # an outer branch comes last, and takes those inside it along
        if branch.add in set(graph.nodes):
            cut(graph, branch)


def without(graph: fx.GraphModule, group: Sequence[Branch]) -> fx.GraphModule:
    """The graph without these branches; it shares its tensors with the one given."""
    return fx.GraphModule(graph, _without(graph, group)[0])


def remove(model: Model, unit: Unit) -> None:
    """Cut a unit's branches out of the model, in place, and the parameters that only they read."""
    read = read_by(model.graph)
    _cut_all(model.graph.graph, unit.branches)
    remove_unread(model, read)
    model.graph.graph.lint()
    model.graph.recompile()


# --- which units can go one after the other --------------------------------------------------


def innermost(found: Sequence[Unit]) -> list[Unit]:
    """The units that hold no other: no more than those can be removed."""
    return [u for u in found if not any(inside(v, u) for v in found if v is not u)]


def inside(inner: Unit, outer: Unit) -> bool:
    """Whether one unit goes when the other does."""
    return any(branch.add in outer.lost for branch in inner.branches)


def go_together(graph: fx.GraphModule, group: Iterable[Unit]) -> bool:
    """Whether a model is left without all of these units, as `lost` has it."""
    every = [branch for unit in group for branch in unit.branches]
    return bool(lost(graph, sorted(every, key=lambda branch: branch.add)))


def in_turn(
    graph: fx.GraphModule, found: Sequence[Unit], count: int, first: Unit | None = None
) -> int:
    """How many units, up to ``count``, can go after one another, ``first`` before all others.

    It removes them from copies of the graph and needs no data. Which can go depends on which are
    gone: two blocks may be the only ones that read an input, and then one has to stay.
    """
    chosen = [] if first is None else [first]
    others = [u for u in innermost(found) if not any(u is v or inside(u, v) for v in chosen)]
    wanted = [*chosen, *others][:count]
    if go_together(graph, wanted):
        return len(wanted)
    if chosen and not go_together(graph, chosen):
        return 0
    for unit in others:
        if len(chosen) < count and go_together(graph, [*chosen, unit]):
            chosen.append(unit)
    return len(chosen)


def at_most(graph: fx.GraphModule, found: Sequence[Unit], count: int) -> int:
    """How many of the units can be removed in all, up to ``count``.

    Greedily, from every first unit: exact unless two inputs or more each need a block to stay.
    """
    inner = innermost(found)
    best = in_turn(graph, found, count)
    if best >= min(count, len(inner) - 1):  # that all of them cannot go together has been seen
        return best
    return max(in_turn(graph, found, count, unit) for unit in inner)
