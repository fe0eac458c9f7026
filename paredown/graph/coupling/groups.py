"""Units that are alike: what can be cut, and from which tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import PINNED, Walk
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of


@dataclass(frozen=True)
class Member:
    """One dimension of a parameter or buffer that a group cuts.

    ``indices`` (units, m) are the m indices of dimension ``dim`` that go with each unit.
    ``role``: "out" where the dimension is the output of a convolution, linear layer or embedding,
    "in" where it is the input of one, "scale" for a norm's weight, "other" for the rest (biases,
    running statistics, positions).
    """

    name: str
    dim: int
    indices: np.ndarray
    role: str


@dataclass(frozen=True)
class Group:
    """Units (channels, neurons, heads) that are alike: each can be cut, alone, from all members.

    ``exact``: a model with the units set to zero computes what the cut model computes; else
    ``reduced_by`` names an op (a layer norm, a softmax, a mean) that sees how many there are.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    exact: bool
    reduced_by: str = ""


@dataclass(frozen=True)
class Tensors:
    """A parameter or buffer with the roots of its labels, per dimension; None where pinned."""

    name: str
    shape: tuple[int, ...]
    roots: tuple[np.ndarray | None, ...]
    trains: bool
    item_bytes: int


def groups_of(
    model: Model, walk: Walk, tensors: tuple[Tensors, ...]
) -> tuple[tuple[Group, ...], dict[str, np.ndarray]]:
    """Units with the same members are a group; a unit that is alone in its group stays."""
    places = [
        (t, dim, roots)
        for t in tensors
        for dim, roots in enumerate(t.roots)
        if roots is not None and roots.any()
    ]
    parts = [np.unique(walk.labels.find(labels)) for labels in walk.parts]
    kinds = _kinds([*(roots for _, _, roots in places), *parts], walk.labels.count)
    reduced = np.zeros(walk.labels.count, dtype=np.int64)
    for number, (labels, _) in enumerate(walk.reduced):
        reduced[walk.labels.find(labels)] = number + 1
    roles = _roles(model.graph)
    groups: list[Group] = []
    units: dict[str, np.ndarray] = {}
    alike = _alike(places, kinds)
    for roots, inside in zip(alike, _inside(places, alike, walk.labels.count), strict=True):
        members = tuple(
            Member(t.name, dim, indices, roles.get((t.name, dim), "other"))
            for t, dim, indices in inside
        )
        if not any(
            t.trains or m.role != "other" for (t, _, _), m in zip(inside, members, strict=True)
        ):
            continue  # only constants, as a table of frequencies: nothing that a layer computes
        name = _group_name(members, units)
        units[name] = roots
        by = reduced[roots].max()
        why = walk.reduced[by - 1][1] if by else ""
        groups.append(Group(name, len(roots), members, not by, why))
    return tuple(groups), units


def _kinds(places: list[np.ndarray], labels: int) -> np.ndarray:
    """(labels, 2) a number for each root's multiset of places: sums of random numbers, equal by
    chance once in 2^128.

    Places are dimensions of parameters, and the parts that an op takes of a dimension: each part
    keeps units of its own then, and none is ever left empty.
    """
    random = np.random.default_rng(0)
    kinds = np.zeros((labels, 2), dtype=np.uint64)
    for roots in places:
        np.add.at(kinds, roots, random.integers(1, 2**63, (1, 2), dtype=np.uint64))
    kinds[PINNED] = 0
    return kinds


def _alike(places: list[tuple[Tensors, int, np.ndarray]], kinds: np.ndarray) -> list[np.ndarray]:
    """The roots of each group of two and more, in the order of their first place."""
    if not places:
        return []
    present = np.concatenate([roots for _, _, roots in places])
    roots, first = np.unique(present[present != PINNED], return_index=True)
    if not roots.size:
        return []
    _, inverse = np.unique(kinds[roots], axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    bounds = np.flatnonzero(np.diff(inverse.ravel()[order])) + 1
    sets = [np.sort(each) for each in np.split(order, bounds) if len(each) > 1]
    return [roots[each] for each in sorted(sets, key=lambda each: first[each].min())]


def _inside(
    places: list[tuple[Tensors, int, np.ndarray]], groups: list[np.ndarray], labels: int
) -> list[list[tuple[Tensors, int, np.ndarray]]]:
    """For each group the dimensions it cuts, with the (units, m) indices that go with each unit.

    One pass over the places, each sorted once: linear but for that, however many groups there are.
    """
    found: list[list[tuple[Tensors, int, np.ndarray]]] = [[] for _ in groups]
    starts = np.cumsum([0, *map(len, groups)])
    numbers = np.full(labels, -1)  # root -> the unit's number, counted through all groups
    if groups:
        numbers[np.concatenate(groups)] = np.arange(starts[-1])
    for tensor, dim, roots in places:
        units = numbers[roots]
        order = np.argsort(units, kind="stable")[(units < 0).sum() :]
        group = np.searchsorted(starts, units[order], side="right") - 1
        bounds = np.flatnonzero(np.diff(group)) + 1
        for part in np.split(order, bounds) if order.size else ():
            number = int(np.searchsorted(starts, units[part[0]], side="right")) - 1
            found[number].append((tensor, dim, part.reshape(len(groups[number]), -1)))
    return found


def _roles(graph: fx.GraphModule) -> dict[tuple[str, int], str]:
    """(parameter, dimension) -> its role; tied parameters under their first name."""
    first: dict[int, str] = {}
    for name, tensor in [*graph.named_parameters(), *graph.named_buffers()]:
        first.setdefault(id(tensor), name)
    found: dict[tuple[str, int], str] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and "norm" in str(node.target) and len(node.args) > 1:
            weight = next((n for n in node.all_input_nodes[1:] if n.op == "get_attr"), None)
            if weight is not None:
                found[first.get(id(tensor_of(graph, str(weight.target))), ""), 0] = "scale"
    for site in sites(graph):
        name = first[id(tensor_of(graph, site.weight))]
        inputs = {"embedding": 0}.get(site.kind, 1 - site.axis if site.axis < 2 else 1)
        found[name, inputs] = "in"
        found[name, site.axis if site.kind != "embedding" else 1] = "out"
    return found


def _group_name(members: tuple[Member, ...], taken: dict[str, np.ndarray]) -> str:
    """After the layer that makes its values: the first weight whose output it is."""
    makers = [m.name for m in members if m.role == "out"] or [m.name for m in members]
    stem = makers[0].removesuffix(".weight")
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}#{number}"
    return name
