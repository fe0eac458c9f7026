"""Which weights are rounded by themselves, and where their fake quantizers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from paredown.graph.edit import keep_meta, set_buffer
from paredown.graph.group_scales import Grid
from paredown.graph.grouped import fake_quantize_group
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.quantized import PER_GROUP, quantized_weights
from paredown.graph.sites import Site, sites, tensor_of
from paredown.types import UserError

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
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def stored_bytes(self, channels: int, features: int) -> int:
        """At most, of a weight with so many rows of so many numbers, and of what is around it."""
        parted = 0 < self.group < features
        groups = -(-features // self.group) if parted else 1
        parts = int(parted) + int(self.zero_point is not False)
        around = NODE_BYTES + PART_BYTES * parts
        return channels * (-(-features * self.bits // 8) + 3 * groups) + around


@dataclass(frozen=True)
class WeightLayer:
    """A weight under all its names, the nodes that read it, and the ops that use it.

    ``axis`` is the dimension of its output channels, each a row of `paredown.graph.grouped`.
    """

    weight: Tensor
    uses: tuple[Site, ...]
    axis: int
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.uses[0].weight

    @property
    def kind(self) -> str:
        return self.uses[0].kind

    def group_of(self, rounding: Rounding) -> int:
        """The size of its groups; 0, the whole channel, where that is no larger than one."""
        features = self.weight.numel() // self.weight.shape[self.axis]
        return rounding.group if rounding.group < features else 0

    def rounded(self, grid: Grid, rounding: Rounding) -> Tensor:
        """The weight as it is on the grid."""
        group = self.group_of(rounding)
        return fake_quantize_group(
            self.weight.detach(), *grid, self.axis, group, rounding.low, rounding.high
        )


def weight_layers(
    model: Model, rounding: Rounding, exclude: Sequence[str], embeddings: bool, ends: set[str]
) -> list[WeightLayer]:
    """The float32 weights that are smaller once rounded, in the order they run.

    Args:
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
        left = fits([n for site in uses for n in with_layer(site.weight)], exclude)
        looked_up = all(site.kind == "embedding" for site in uses)
        if key not in spared and not left and (embeddings or not looked_up):
            layer = _layer(model, uses)
            if _pays(layer, rounding):
                found.append(layer)
    if not found:
        raise UserError(
            "QuantizeWeights: "
            + ("the model is quantized already; " if quantized else "")
            + "no float32 weight is left that would be smaller as integers"
            + (", besides those excluded." if exclude else ".")
        )
    return found


def _ends(model: Model, ends: set[str]) -> set[int]:
    computing = [site for site in sites(model.graph) if site.kind != "embedding"]
    chosen = [
        *(computing[:1] if "first" in ends else ()),
        *(computing[-1:] if "last" in ends else ()),
    ]
    return {id(tensor_of(model.graph, site.weight)) for site in chosen}


def _layer(model: Model, uses: list[Site]) -> WeightLayer:
    weight = tensor_of(model.graph, uses[0].weight)
    stacked = uses[0].kind == "matmul" and weight.dim() > 2  # (..., inputs, outputs)
    axis = weight.dim() - 1 if stacked else uses[0].axis
    read = [n for n in model.graph.graph.nodes if n.op == "get_attr" and n.users]
    owned = dict(model.graph.named_parameters(remove_duplicate=False))
    nodes = [node for node in read if owned.get(str(node.target)) is weight]
    return WeightLayer(weight, tuple(uses), axis, nodes)


def _pays(layer: WeightLayer, rounding: Rounding) -> bool:
    weight = layer.weight
    if str(weight.dtype) != "torch.float32" or not layer.nodes:
        return False
    if not bool(weight.isfinite().all()):
        raise UserError(f"QuantizeWeights: {layer.name!r} holds NaN or infinite weights.")
    channels = weight.shape[layer.axis]
    features = weight.numel() // channels
    return rounding.stored_bytes(channels, features) < weight.nbytes


def insert(model: Model, layer: WeightLayer, grid: Grid, rounding: Rounding) -> None:
    """Let all that reads the weight read it through a fake quantizer, in place.

    The quantizer stands right before the first reader, so that one rounded weight is in memory at
    a time.
    """
    graph = model.graph.graph
    place = {node: number for number, node in enumerate(graph.nodes)}
    rest = (layer.axis, layer.group_of(rounding), rounding.low, rounding.high)
    for node in layer.nodes:
        first = min(node.users, key=lambda user: place.get(user, -1))
        held: list[fx.Node | None] = []
        with graph.inserting_before(first):
            for suffix, values in zip(("scale", "zero_point"), grid, strict=True):
                name = f"{node.target}_{suffix}"
                if values is not None:
                    set_buffer(model.graph, name, values)
                held.append(None if values is None else graph.get_attr(name))
            made = graph.call_function(PER_GROUP, (node, *held, *rest))
        keep_meta(made, node)
        for user in [user for user in node.users if user is not made]:
            user.replace_input_with(node, made)
