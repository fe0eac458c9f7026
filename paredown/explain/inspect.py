"""What structured pruning can cut from a model, told so that a person can choose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text
from torch import fx

from paredown.core.terminal import WIDEST, broken
from paredown.core.units import human
from paredown.graph.coupling.coupling import Costs, Coupling, analyze
from paredown.graph.coupling.groups import Group, Member
from paredown.graph.coupling.labels import Value
from paredown.graph.model import Model
from paredown.graph.sites import sites

SHOWN = 3  # layers of a group or a reason that are named; the rest is counted

# ops whose name has one of the words -> why what they touch stays whole; the first that fits
WHY = {
    "embedding": "the rows of an embedding are the vocabulary or the positions",
    "conv": "convolutions keep their kernels' sizes and the channels of the model's input",
    "pool interpolate upsample pad roll pixel": "an op works on the places of an image or sequence",
    "linear matmul mm addmm einsum": "a layer reads or is tied to values whose size is given",
    "slice select index gather scatter take copy_ split chunk unbind sort topk cumsum flip": (
        "an op picks certain indices, or writes to them"
    ),
    "view reshape flatten unflatten expand repeat": "a size is written out in a way it must keep",
    "lstm gru rnn": "a recurrent layer keeps its sequence and its first state",
    "add sub mul div where cat stack maximum minimum pow": (
        "values are combined with others whose size is given"
    ),
    "norm softmax mean sum attention": "a reduction needs the whole of what it looks at",
}
NO_RULE = "no rule covers the op, so what it touches is left alone"
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
REASONS = {
    "it is an output of the model": "the outputs of the model keep their size",
    "its whole dimension would go at once": "a dimension's indices are all tied to each other",
    "its axes cannot be cut apart": "dimensions were merged that cannot be cut apart",
}


@dataclass(frozen=True)
class Unit:
    """One group as a person reads it.

    Attributes:
        unit: what one unit is: "channels", "neurons", "heads of 16".
        layers: the layers that members belong to, in the order of the model.
        seen_by: the op, and the layer it is in, that sees how many units there are; "" where the
            group is exact.
        half: what cutting half of the units of this group alone saves.
    """

    name: str
    units: int
    unit: str
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    exact: bool
    seen_by: str
    half: Costs


@dataclass(frozen=True)
class Pin:
    """Why indices of parameters and values stay whole: an op, and the layer it is in."""

    indices: int
    why: str
    op: str = ""
    layer: str = ""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` finds; ``pins`` are sorted, most first."""

    name: str
    costs: Costs
    groups: tuple[Unit, ...]
    coverage: float
    pins: tuple[Pin, ...]
    unknown: dict[str, tuple[str, ...]]  # op without a rule -> the layers it is in
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, members in full; of their indices how many go with each unit."""
        found = asdict(self)
        for group in found["groups"]:
            for member in group["members"]:
                member["indices_per_unit"] = int(member.pop("indices").shape[1])
        return found


def inspect_model(model: Model, coupling: Coupling | None = None, name: str = "") -> Inspection:
    """Costs, groups and what stays whole; no data is run.

    Args:
        coupling: of the model, where other policies than the usual are wanted.
        name: of the model, where the name of its class is not the one to show.

    Example:
        >>> import torch, paredown
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> found = inspect_model(paredown.capture(net, (torch.zeros(1, 4),)))
        >>> [(g.units, g.unit, g.layers, g.half.parameters) for g in found.groups]
        [(8, 'neurons', ('0', '2'), 28)]
    """
    coupling = coupling or analyze(model)
    nodes = {node.name: node for node in model.graph.graph.nodes}
    return Inspection(
        name or _class_of(model),
        coupling.costs(),
        tuple(_units(model, coupling, nodes)),
        coupling.coverage,
        tuple(_pins(coupling, nodes)),
        {op: _layers_with(op, nodes) for op in coupling.unknown},
        model.notes,
    )


def _class_of(model: Model) -> str:
    """The class of the user's module, as far as the graph knows it."""
    stacks = (node.meta.get("nn_module_stack") for node in model.graph.graph.nodes)
    kinds = (kind for stack in stacks for path, kind in (stack or {}).values() if not path)
    return str(next(kinds, "model")).rpartition(".")[2]


def _layer(node: fx.Node) -> str:
    """The user's innermost module that runs the op; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _op(node: fx.Node) -> str:
    """An op's bare name: "aten.layer_norm.default" is a layer_norm."""
    name = str(node.target)
    return name.split(".")[1] if name.count(".") > 1 else name


def _found(why: str, nodes: dict[str, fx.Node]) -> fx.Node | None:
    """The op that the analysis tells of as "name (target)"."""
    match = re.fullmatch(r"(\S+) \(.+\)", why)
    return nodes.get(match[1]) if match else None


# --- groups ----------------------------------------------------------------------------------


def _units(model: Model, coupling: Coupling, nodes: dict[str, fx.Node]) -> Iterator[Unit]:
    whole = coupling.costs()
    kinds = {site.weight: site.kind for site in sites(model.graph)}
    axes = _attention_axes(model.graph, coupling)
    for group in coupling.groups:
        left = coupling.costs({group.name: np.arange(group.size) >= group.size // 2})
        half = Costs(
            whole.parameters - left.parameters,
            whole.macs - left.macs,
            whole.size_bytes - left.size_bytes,
        )
        units = coupling.units[group.name]
        within = next((what for what, roots in axes.items() if np.isin(units, roots).any()), "")
        kind = _kind(group, kinds, within)
        layers = tuple(dict.fromkeys(m.name.rpartition(".")[0] or m.name for m in group.members))
        seen = _seen_by(group.reduced_by, nodes)
        yield Unit(group.name, group.size, kind, group.members, layers, group.exact, seen, half)


def _seen_by(reason: str, nodes: dict[str, fx.Node]) -> str:
    node = _found(reason, nodes)
    if node is None:
        return reason
    return f"{_op(node)} in {_layer(node)}" if _layer(node) else _op(node)


def _kind(group: Group, kinds: dict[str, str], within: str) -> str:
    """What one unit of a group is, from the layer that makes it and where attention has it."""
    sized = [m for m in group.members if m.role in ("out", "in")] or list(group.members)
    widths = [m.indices.shape[1] for m in sized]
    width = min(widths)
    if within == "heads":  # a bias of attention has one index for each head
        width = min((each for each in widths if each > 1), default=1)
        return f"heads of {width}" if width > 1 else "heads"
    if within == "dimensions":
        return "dimensions of every head"
    makers = [kinds.get(m.name, "") for m in sized if m.role == "out"]
    if any(made.startswith("conv") for made in makers[:1]):
        kind = "channels"
    else:
        kind = "neurons" if makers and "embedding" not in makers else "features"
    if width == 1:
        return kind
    narrow = next(m for m in sized if m.indices.shape[1] == width)
    neighbours = bool((np.diff(narrow.indices, axis=1) == 1).all())
    return f"{'groups' if neighbours else 'sets'} of {width} {kind}"


def _attention_axes(graph: fx.GraphModule, coupling: Coupling) -> dict[str, np.ndarray]:
    """The labels that attention has along its heads, and along the dimensions of each head."""
    found: dict[str, list[np.ndarray]] = {"heads": [], "dimensions": []}
    for node in _queries(graph, coupling):
        value = coupling.values.get(node.name)
        for block in value.blocks if isinstance(value, Value) else ():
            last = len(value.shape) - 1  # type: ignore[union-attr]
            varies = [a for d, a in enumerate(block.axes) if np.ptp(block.labels, axis=d).any()]
            if varies and varies[0] < last - 1:
                found["heads"].append(block.labels.ravel())
            elif last in varies:
                found["dimensions"].append(block.labels.ravel())
    return {what: np.concatenate(labels) for what, labels in found.items() if labels}


def _queries(graph: fx.GraphModule, coupling: Coupling) -> Iterator[fx.Node]:
    """Queries, keys and values of every attention: of the fused op, or of the product whose
    softmax is taken over its last axis."""
    for node in graph.graph.nodes:
        value = coupling.values.get(node.name)
        if "scaled_dot_product" in str(node.target):
            yield from node.all_input_nodes[:3]
        elif _op(node) in ("softmax", "_softmax") and isinstance(value, Value):
            if node.args[1] not in (-1, len(value.shape) - 1):
                continue
            source = node
            while source.all_input_nodes and _op(source) not in PRODUCTS:
                source = source.all_input_nodes[0]
            yield from source.all_input_nodes[:2]


# --- what stays whole ------------------------------------------------------------------------


def _pins(coupling: Coupling, nodes: dict[str, fx.Node]) -> Iterator[Pin]:
    for reason, count in sorted(coupling.pinned_by.items(), key=lambda item: -item[1]):
        node = _found(reason, nodes)
        if node is None:
            yield Pin(count, REASONS.get(reason, reason or "it is not known why"))
        else:
            op = str(node.target)
            why = NO_RULE if op in coupling.unknown else _why(_op(node))
            yield Pin(count, why, op, _layer(node))


def _why(op: str) -> str:
    """Plain words for why an op pins.

    Example:
        >>> _why("conv2d")
        "convolutions keep their kernels' sizes and the channels of the model's input"
    """
    fits = (why for words, why in WHY.items() if any(word in op for word in words.split()))
    return next(fits, f"the op {op} keeps what it touches")


def _few(names: Iterable[str]) -> str:
    """The first names, and how many more there are.

    Example:
        >>> _few(["a", "b", "c", "d", "e"]), _few([])
        ('a, b, c and 2 more', '')
    """
    named = [name or "the model itself" for name in names]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    return ", ".join(named[:SHOWN]) + more


def _within(count: int, layers: tuple[str, ...]) -> str:
    """How many tensors there are and the first of their layers, what they share told once.

    Example:
        >>> _within(3, ("net.2.q", "net.2.k")), _within(2, ("a", "b.c"))
        ('3 of net.2: q, k', '2 of a, b.c')
    """
    paths = [layer.split(".") for layer in layers]
    parents = zip(*(path[:-1] for path in paths[:SHOWN]), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, parents)]
    named = _few(".".join(path[len(shared) :]) for path in paths[:SHOWN])
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return (
        f"{count} of {'.'.join(shared)}: {named}{more}" if shared else f"{count} of {named}{more}"
    )


def _layers_with(op: str, nodes: dict[str, fx.Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_layer(n) for n in nodes.values() if str(n.target) == op))


# --- for a terminal --------------------------------------------------------------------------


def shown(found: Inspection, width: int) -> Iterator[Table | Text]:
    """The inspection as a person reads it, in ``width`` columns, 70 at least."""
    whole = found.costs
    yield Text(
        f"{found.name}: {human('count', whole.parameters)} parameters, "
        f"{human('count', whole.macs)} multiply-adds, "
        f"{human('size', whole.size_bytes)}"
    )
    for note in found.notes:
        yield Text(f"note: {note}")
    if found.groups:
        yield Text(
            "\nWhat can be cut; the last columns: what cutting half of that group alone saves.\n"
        )
        yield groups_table(found.groups, min(max(width, 70), WIDEST))
        yield Text(
            f"\nCoverage: {found.coverage:.1%} of the weights of layers have a dimension that can "
            "be cut."
        )
    else:
        yield Text(
            "No group: nothing in this model can be cut by whole channels, neurons or heads."
        )
    if found.pins:
        yield Text("\nWhat stays whole, counted in indices of dimensions, and why:")
        yield _pins_table(found.pins)
    for op, layers in found.unknown.items():
        where = f" (in {_few(layers)})" if any(layers) else ""
        yield Text(f"No rule for {op}{where}: what it touches stays whole.")


def groups_table(groups: tuple[Unit, ...], width: int) -> Table:
    """A row for each group, in ``width`` columns of text; names break after dots."""
    free = width - 47  # the other columns, and two spaces between any two
    columns = {"group": free * 3 // 8, "units": 13, "tensors": free * 3 // 8, "exact": free // 4}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name, size in columns.items():
        table.add_column(name, width=size, overflow="fold")
    for name in ("params", "macs", "bytes"):
        table.add_column(name, width=7, justify="right", overflow="fold")
    for group in groups:
        saved = group.half
        table.add_row(
            broken(group.name, columns["group"]),
            f"{group.units} {group.unit}",
            broken(_within(len(group.members), group.layers), columns["tensors"]),
            broken("yes" if group.exact else f"no: seen by {group.seen_by}", columns["exact"]),
            human("count", saved.parameters),
            human("count", saved.macs),
            human("size", saved.size_bytes),
        )
    return table


def _pins_table(pins: tuple[Pin, ...]) -> Table:
    """One row for each reason, most first, with the layers that pin most by it."""
    layers: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for pin in pins:
        counts[pin.why] = counts.get(pin.why, 0) + pin.indices
        layers.setdefault(pin.why, []).extend([pin.layer] if pin.op else [])
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", width=7)
    table.add_column()
    for why, count in sorted(counts.items(), key=lambda item: -item[1]):
        where = _few(dict.fromkeys(layers[why]))
        table.add_row(f"{count:,}", Text(why + (f": {where}" if where else "")))
    return table
