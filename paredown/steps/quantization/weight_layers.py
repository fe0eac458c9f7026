"""Which weights are rounded by themselves, and where their fake quantizers go."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph import lazily
from paredown.graph.edit import keep_meta
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.quantized.forms import Form, of_op
from paredown.graph.quantized.group_scales import Grid, choose_grid
from paredown.graph.quantized.grouped import PER_GROUP, fake_quantize_group
from paredown.graph.quantized.quantizers import quantized_weights
from paredown.graph.rows import rows
from paredown.graph.sites import Site, sites
from paredown.graph.state import set_buffer, tensor_of

NODE_BYTES = 400  # that the ops around a weight take in a file,
PART_BYTES = 300  # and those of groups, and of zero points


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded; see `paredown.QuantizeWeights` for the settings."""

    bits: int
    group: int  # 0 is the whole channel
    zero_point: bool | None = None
    damping: float = 0.01
    order: bool = True

    @property
    def form(self) -> Form:
        return of_op(PER_GROUP, self.bits)

    @property
    def low(self) -> int:
        return self.form.low

    @property
    def high(self) -> int:
        return self.form.high

    def stored_bytes(self, channels: int, features: int) -> int:
        """At most, of a weight with so many rows of so many numbers, and of what is around it."""
        parted = 0 < self.group < features
        groups = -(-features // self.group) if parted else 1
        parts = int(parted) + int(self.zero_point is not False)
        around = NODE_BYTES + PART_BYTES * parts
        return channels * (self.form.stored_bytes(features) + 3 * groups) + around


@dataclass(frozen=True)
class WeightLayer:
    """A weight under all its names, the nodes that read it, the ops that use it, its rounding.

    ``axis`` is the dimension of its output channels, each a row of `paredown.graph.rows`;
    ``group`` is 0, the whole channel, where that is no larger than a group.
    """

    weight: Tensor
    uses: tuple[Site, ...]
    axis: int
    rounding: Rounding
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.uses[0].weight

    @property
    def kind(self) -> str:
        return self.uses[0].kind

    @property
    def group(self) -> int:
        features = self.weight.numel() // self.weight.shape[self.axis]
        return self.rounding.group if self.rounding.group < features else 0

    def rounded(self, grid: Grid) -> Tensor:
        """The weight as it is on the grid."""
        low, high = self.rounding.low, self.rounding.high
        weight = self.weight.detach()
        return fake_quantize_group(weight, *grid, self.axis, self.group, low, high)


def weight_layers(
    model: Model,
    rounding: Rounding,
    tables: Rounding | None,
    exclude: Sequence[str],
    ends: set[str],
) -> list[WeightLayer]:
    """The float32 weights that are smaller once rounded, in the order they run.

    Args:
        tables: how weights that are looked up are rounded; None leaves them in float.
        ends: "first" and "last", where that layer is left in float.

    Raises:
        UserError: a pattern fits no name; NaN in a weight; nothing is left to quantize.
    """
    groups: dict[int, list[Site]] = {}
    for site in sites(model.graph):
        groups.setdefault(id(tensor_of(model.graph, site.weight)), []).append(site)
    names = (n for uses in groups.values() for site in uses for n in with_layer(site.weight))
    check_exclude(exclude, names, "layer or weight")
    quantized = quantized_weights(model.graph)
    spared = {id(tensor_of(model.graph, name)) for name in quantized} | _ends(model, ends)
    found = []
    for key, uses in groups.items():
        excluded = fits([n for site in uses for n in with_layer(site.weight)], exclude)
        looked_up = any(site.kind == "embedding" for site in uses)
        how = tables if looked_up else rounding
        if key not in spared and not excluded and how is not None:
            layer = _layer(model, uses, how)
            if _pays(layer):
                found.append(layer)
    if not found:
        raise UserError(
            "QuantizeWeights: "
            + ("the model is quantized already; " if quantized else "")
            + "no float32 weight is left that would be smaller as integers"
            + (", besides those excluded." if exclude else ".")
        )
    return found


def tables(model: Model, rounding: Rounding, skip: Collection[str]) -> list[WeightLayer]:
    """The float32 tables that are looked up and are smaller once rounded, but for those named."""
    uses: dict[int, list[Site]] = {}
    for site in sites(model.graph):
        if site.kind == "embedding":
            uses.setdefault(id(tensor_of(model.graph, site.weight)), []).append(site)
    wanted = [each for each in uses.values() if not {s.weight for s in each} & set(skip)]
    return [layer for layer in (_layer(model, each, rounding) for each in wanted) if _pays(layer)]


def _ends(model: Model, ends: set[str]) -> set[int]:
    computing = [site for site in sites(model.graph) if site.kind != "embedding"]
    first, last = computing[:1] * ("first" in ends), computing[-1:] * ("last" in ends)
    return {id(tensor_of(model.graph, site.weight)) for site in (*first, *last)}


def _layer(model: Model, uses: list[Site], rounding: Rounding) -> WeightLayer:
    weight = tensor_of(model.graph, uses[0].weight)
    stacked = uses[0].kind == "matmul" and weight.dim() > 2  # (..., inputs, outputs)
    axis = weight.dim() - 1 if stacked else uses[0].axis
    read = [n for n in model.graph.graph.nodes if n.op == "get_attr" and n.users]
    owned = dict(model.graph.named_parameters(remove_duplicate=False))
    nodes = [node for node in read if owned.get(str(node.target)) is weight]
    return WeightLayer(weight, tuple(uses), axis, rounding, nodes)


def _pays(layer: WeightLayer) -> bool:
    weight = layer.weight
    if weight.dtype is not torch.float32 or not layer.nodes:
        return False
    if not lazily.finite(weight):
        raise UserError(f"QuantizeWeights: {layer.name!r} holds NaN or infinite weights.")
    channels = weight.shape[layer.axis]
    return layer.rounding.stored_bytes(channels, weight.numel() // channels) < weight.nbytes


def nearest(layer: WeightLayer) -> Grid:
    """The grid of a weight that is rounded to nearest."""
    flat, how = rows(layer.weight.detach(), layer.axis), layer.rounding
    return choose_grid(flat, layer.group, how.low, how.high, zero_point=how.zero_point)


def insert(
    model: Model, layer: WeightLayer, grid: Grid, readers: Collection[fx.Node] | None = None
) -> None:
    """Let all that reads the weight, or ``readers`` alone, read it through a fake quantizer, in
    place.

    The quantizer stands right before the first reader, so that one rounded weight is in memory at
    a time.
    """
    graph = model.graph.graph
    place = {node: number for number, node in enumerate(graph.nodes)}
    rest = (layer.axis, layer.group, layer.rounding.low, layer.rounding.high)
    part = "" if readers is None else "table_"
    for node in layer.nodes:
        users = [user for user in node.users if readers is None or user in readers]
        if not users:
            continue
        first = min(users, key=lambda user: place.get(user, -1))
        held: list[fx.Node | None] = []
        with graph.inserting_before(first):
            for suffix, values in zip(("scale", "zero_point"), grid, strict=True):
                name = f"{node.target}_{part}{suffix}"
                if values is not None:
                    set_buffer(model.graph, name, values)
                held.append(None if values is None else graph.get_attr(name))
            made = graph.call_function(PER_GROUP, (node, *held, *rest))
        keep_meta(made, node)
        for user in users:
            user.replace_input_with(node, made)
