"""The inner values of a captured graph that one can teach or learn from, and their names."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import ACTIVATION_QUANTIZERS
from paredown.graph.sites import sites
from paredown.graph.taps import ATTENTION, SOFTMAX, walk

_SECOND = ("conv", "batch_norm", "group_norm", "instance_norm")  # ops with channels second
_LAST = ("linear", "layer_norm", "embedding", "rms_norm", "lstm", "gru")  # and with channels last
_SAME = ("to", "alias", "detach", "clone", "contiguous", "dropout")
_PRODUCTS = ("matmul", "bmm", "dropout")  # what reads the probabilities of attention


@dataclass(frozen=True)
class Stage:
    """One inner value: its op, the module that gives it, how deep it lies and how it looks.

    ``depth`` is the share of the weights' uses up to there, ``shape`` that on the examples looked
    at, batch first, ``channels`` the dimension of the channels, 1 or the last.
    """

    node: str
    layer: str
    depth: float
    shape: tuple[int, ...]
    channels: int
    is_item: bool  # whether an item of a list of modules gives it, such as a transformer's block

    @property
    def width(self) -> int:
        return self.shape[self.channels]

    @property
    def places(self) -> tuple[int, ...]:
        """The sizes besides batch and channels."""
        return tuple(s for dim, s in enumerate(self.shape) if dim not in (0, self.channels))

    @property
    def rank(self) -> tuple[bool, bool]:
        return math.prod(self.places) > 1, self.is_item

    def __str__(self) -> str:
        return f"{self.layer} {self.shape[1:]}"


class View:
    """A model as it runs on a few examples: which values there are, of which shape, how deep."""

    def __init__(self, model: Model, leaves: Sequence[Tensor], whose: str):
        self.graph, self.whose = model.graph, whose
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.batch = len(leaves[0])
        walk(model.graph, leaves, self._note)
        self.carrying = _carrying(model.graph)
        paths = {path for node in model.graph.graph.nodes for path in _paths(node)}
        self.containers = {path.rpartition(".")[0] for path in paths}
        uses = {site.node for site in sites(model.graph)}
        passed = itertools.accumulate(node in uses for node in model.graph.graph.nodes)
        count = max(1, len(uses))
        self.depth = {n: d / count for n, d in zip(model.graph.graph.nodes, passed, strict=True)}

    def _note(self, node: fx.Node, value: object) -> None:
        kept = isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        if node.op == "call_function" and kept:
            assert isinstance(value, Tensor)
            self.shapes[node] = tuple(value.shape)

    def usable(self, node: fx.Node) -> bool:
        """Whether it is a float value of each example, made of the inputs by weights."""
        shape = self.shapes.get(node, (0,))
        return node in self.carrying and shape[0] == self.batch and min(shape) > 0

    def stage(self, node: fx.Node) -> Stage:
        shape = self.shapes[node]
        dim = channel_dim(node, self.shapes)
        layer = _given_out(node, self.containers)
        is_item = layer in self.containers and _is_item(layer)
        return Stage(node.name, layer, self.depth[node], shape, dim, is_item)

    def stages(self) -> list[Stage]:
        """The values that all of the computation passes through, one before each use of a weight.

        Where there are none, as in a net of towers, the values that weights give.
        """
        points = [_source(node) for node in _cut_points(self.graph, self.carrying)]
        points = [node for node in points if self.usable(node)]
        inner = [node for node in points if self.depth[node] < 1]  # the rest makes the output
        if not inner:
            weighted = {site.node for site in sites(self.graph)}
            inner = [n for n in self.shapes if n in weighted and self.usable(n)][:-1]
        found: dict[float, Stage] = {}
        for stage in map(self.stage, inner):  # the last of those that say most
            if stage.depth not in found or stage.rank >= found[stage.depth].rank:
                found[stage.depth] = stage
        return list(found.values())

    def attention(self) -> list[Stage]:
        """The maps of attention, in order."""
        return [self.stage(node) for node in self.shapes if self.usable(node) and _is_map(node)]

    def find(self, name: str, maps: bool = False) -> Stage:
        """The value that the module of that name gives, or the op.

        Raises:
            UserError: there is none; suggests the nearest.
        """
        found = {node.name: node for node in self.shapes if self.usable(node)}
        inside: dict[str, list[fx.Node]] = {}
        for node in found.values():
            for path in _paths(node):
                inside.setdefault(path, []).append(node)
        inside.pop("", None)
        if maps:
            inside = {p: [n for n in nodes if _is_map(n)] for p, nodes in inside.items()}
            inside = {path: nodes for path, nodes in inside.items() if nodes}
            found = {name: node for name, node in found.items() if _is_map(node)}
        if name in inside:
            return self.stage(_source(_given_by(inside[name])))
        if name in found:
            return self.stage(found[name])
        near = difflib.get_close_matches(name, [*inside, *found], 1, 0.0)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        kind = "attention" if maps else "layer"
        raise UserError(f"layers: the {self.whose} has no {kind} called {name!r}{hint}")


def _given_by(nodes: list[fx.Node]) -> fx.Node:
    """Of a module's values the last that others read; the last where none do."""
    inner = set(nodes)
    outward = [n for n in nodes if not set(_readers(n)) <= inner]
    return (outward or nodes)[-1]


def _paths(node: fx.Node) -> list[str]:
    """The modules around an op, the innermost last; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return ["", *(str(path).partition("@")[0] for path, _ in stack.values())]


def _given_out(node: fx.Node, containers: set[str]) -> str:
    """The module that gives this value to others: an item of a list, where it holds modules, else
    the outermost; where none does, the op of the innermost one."""
    paths = _paths(node)
    read_in = {path for user in _readers(node) for path in _paths(user)}
    giving = [path for path in paths if path and path not in read_in]
    items = [path for path in giving if _is_item(path) and path in containers]
    inside = f"{paths[-1]}'s {node.name}" if paths[-1] else node.name
    return [*items, *giving, inside][0]


def _is_item(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, rounded or not."""
    for user in node.users:
        if _leaves(user):
            yield from _readers(user)
        else:
            yield user


def _source(node: fx.Node) -> fx.Node:
    """What a value was before ops that leave it as it is."""
    while _leaves(node):
        node = node.all_input_nodes[0]
    return node


def _leaves(node: fx.Node) -> bool:
    """Whether the op leaves a value as it is, but for rounding and dropout."""
    return node.target in ACTIVATION_QUANTIZERS or _op(node) in _SAME


def _is_map(node: fx.Node) -> bool:
    if node.target is ATTENTION:
        return True
    readers = {_op(user) for user in node.users}
    return node.target in SOFTMAX and bool(readers) and readers <= {*_PRODUCTS, "quantize"}


def _op(node: fx.Node) -> str:
    """The name of an op, without overload and trailing underscore."""
    if node.target in ACTIVATION_QUANTIZERS:
        return "quantize"
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", node.target)).strip("_")


def channel_dim(node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """Which dimension of a value holds its channels: as the nearest op before it says that has
    them; else the last of three (tokens), and the second of any other number.
    """
    rank = len(shapes[node])
    ahead, seen = [node], set[fx.Node]()
    while ahead:
        here = ahead.pop(0)
        if here in seen or len(shapes.get(here, ())) != rank:
            continue
        seen.add(here)
        name = _op(here)
        if any(word in name for word in _SECOND):
            return 1
        if any(word in name for word in _LAST):
            return rank - 1
        if not any(word in name for word in ("permute", "transpose", "view", "reshape", "matmul")):
            ahead += here.all_input_nodes
    return 2 if rank == 3 else 1


def _carrying(graph: fx.GraphModule) -> set[fx.Node]:
    """The values of the inputs that have met a weight: not masks, positions or shapes."""
    weighted = {site.node for site in sites(graph)}
    fed: set[fx.Node] = set()  # what depends on the inputs
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            fed.add(node)
        elif node.op == "call_function" and "sym_size" not in str(node.target):
            inputs = set(node.all_input_nodes)
            if inputs & fed:
                fed.add(node)
                if node in weighted or inputs & found:
                    found.add(node)
    return found


def _cut_points(graph: fx.GraphModule, carrying: set[fx.Node]) -> Iterator[fx.Node]:
    """The values that no other one passes by, in order, once all inputs have come in."""
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    starts = [order[node] for node in carrying if not carrying & set(node.all_input_nodes)]
    furthest = max(starts, default=0)  # place of the last reader of what came before
    for node, place in order.items():
        if node not in carrying:
            continue
        if furthest <= place:
            yield node
        readers = [order[u] for u in node.users if u in carrying or u.op == "output"]
        furthest = max([furthest, *readers])
