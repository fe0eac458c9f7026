"""Which layers may be factored, in which layout their factors are, and what those cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.graph.names import fits, with_layer
from paredown.graph.ops import arguments
from paredown.graph.patches import groups_of
from paredown.graph.sites import CONVOLUTIONS, Site, readers, sites
from paredown.graph.state import tensor_of
from paredown.graph.values import values_of, wide
from paredown.steps.low_rank.factors import Factors

aten = torch.ops.aten

METHODS = ("auto", "channel", "spatial", "tucker")


@dataclass(frozen=True)
class FactorLayer:
    """A weight with all its uses, in groups: (N, O, C, *kernel), as `factors` has them."""

    uses: tuple[Site, ...]
    weight: Tensor
    places_in: float  # at the example, of all uses together
    places_out: float
    places_between: float = 0.0  # output rows times input columns of a two-dimensional kernel

    @property
    def name(self) -> str:
        return self.uses[0].weight

    @property
    def kind(self) -> str:
        return self.uses[0].kind

    @property
    def groups(self) -> int:
        return len(self.weight)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[3:])

    @property
    def macs(self) -> float:
        """Multiply-adds at the example; a lookup has none."""
        places = {"embedding": 0.0, "conv_transpose": self.places_in}
        return self.weight.numel() * places.get(self.kind, self.places_out)

    def full(self, method: str) -> int:
        """The rank of a group at which nothing is lost."""
        outputs, inputs = self.weight.shape[1:3]
        if method == "spatial":
            return min(outputs * self.kernel[1], inputs * self.kernel[0])
        if method == "tucker":
            return max(outputs, inputs)
        return min(outputs, inputs * math.prod(self.kernel))

    def methods(self, method: str) -> list[str]:
        """What of the methods asked applies: a kernel of one place has channels alone."""
        if self.kind != "conv" or math.prod(self.kernel) == 1:
            return ["channel"]
        spatial = ["spatial"] * (len(self.kernel) == 2 and min(self.kernel) > 1)
        asked = ["channel", *spatial, "tucker"] if method == "auto" else [method]
        return ["channel"] if asked == ["spatial"] and not spatial else asked

    def cost(self, method: str, ranks: Sequence[int]) -> tuple[int, float]:
        """Parameters and multiply-adds of the factors."""
        groups, outputs, inputs = self.weight.shape[:3]
        cells = math.prod(self.kernel)
        if method == "tucker":
            down, core, up = inputs * ranks[0], ranks[0] * ranks[1] * cells, ranks[1] * outputs
            macs = down * self.places_in + (core + up) * self.places_out
            return groups * (down + core + up), groups * macs
        cells, last = self.kernel if method == "spatial" else (cells, 1)
        down, up = ranks[0] * inputs * cells, outputs * ranks[0] * last
        places = self.places_in if self.kind == "conv_transpose" else self.places_out
        if method == "spatial":  # the columns of the first are those of the input
            places = self.places_between
        down_macs = 0.0 if self.kind == "embedding" else down * places
        return groups * (down + up), groups * (down_macs + up * self.places_out)

    def pays(self, method: str, ranks: Sequence[int]) -> bool:
        """Whether the factors are smaller, and no slower by multiply-adds, lookups aside."""
        parameters, macs = self.cost(method, ranks)
        return parameters < self.weight.numel() and (self.kind == "embedding" or macs < self.macs)

    def carried(self, method: str) -> list[tuple[int, ...]]:
        """See `paredown.steps.low_rank.factored.factor`."""
        dims = tuple(range(len(self.kernel)))
        if method == "spatial":
            return [(0,), (1,)]
        return [(), dims, ()] if method == "tucker" else [dims, ()]

    def laid_out(self, made: Factors) -> list[Tensor]:
        """The factors as the ops take them."""
        if self.kind == "matmul":
            return [factor[0].T for factor in made]
        if self.kind == "embedding":
            return [made[0][0].T, made[1][0]]
        flat = [factor.flatten(0, 1) for factor in made]
        if self.kind == "conv_transpose":
            flat[0] = made[0].transpose(1, 2).flatten(0, 1)
        return flat


# --- which layers ----------------------------------------------------------------------------


def factor_layers(
    model: Model, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[FactorLayer], Counter[str]]:
    """The layers that may be factored in the order they run, and why how many others may not."""
    uses: dict[int, list[Site]] = {}
    for site in sites(model.graph):
        uses.setdefault(id(tensor_of(model.graph, site.weight)), []).append(site)
    read = readers(model.graph)
    values = values_of(model)
    batches = [
        (wide(i.example, 0 in i.dynamic), i.example) for i in model.inputs if i.example.dim()
    ]
    scale = len(batches[0][1]) / len(batches[0][0]) if batches else 1.0
    sparse = own_zeros.found(model)
    found, whole = [], Counter[str]()
    for key, each in uses.items():
        names = [name for site in each for name in with_layer(site.weight)]
        if fits(names, exclude) or (include and not fits(names, include)):
            continue
        came_sparse = any(site.weight in sparse for site in each)
        why = "sparse as it came" if came_sparse else _why_whole(model, each, read[key])
        if why:
            whole[why] += 1
        else:
            found.append(_layer(model, each, values, scale))
    return found, whole


def _why_whole(model: Model, uses: list[Site], readers: set[fx.Node]) -> str:
    """Why a weight is not factored; empty where it may be."""
    first, weight = uses[0], tensor_of(model.graph, uses[0].weight)
    if not isinstance(weight, torch.nn.Parameter) or not weight.is_floating_point():
        return "no weight that trains"
    if first.weight.endswith(("_down", "_core", "_up")) and _is_factor(first):
        return "a factor already"
    if first.kind == "recurrent":
        return "recurrent"
    if readers != {site.node for site in uses} or len({_form(site) for site in uses}) > 1:
        return "shared by different ops"
    if first.kind == "conv" and first.node.target not in CONVOLUTIONS[:-1]:
        return "in the general convolution op"
    if first.kind == "matmul" and (weight.dim() > 2 or _scaled(first.node)):
        return "a stack of matrices"
    if any(site.bias is None and _bias(site) is not None for site in uses):
        return "with a computed bias"
    if groups_of(first) > 1 and 1 in in_groups(first, weight).shape[1:3]:
        return "depthwise"  # one input, or one output, for each group: its rank is one
    return ""


def _is_factor(site: Site) -> bool:
    """Whether the op stands right before or behind another factor."""
    near = [*site.node.users, site.input]
    return any(
        isinstance(arg, fx.Node) and str(arg.target).endswith(("_down", "_core", "_up"))
        for node in near
        for arg in node.args
    )


def _form(site: Site) -> tuple[str, str, str]:
    """Uses of one form can be replaced alike."""
    rest = {k: str(v) for k, v in arguments(site.node).items() if not isinstance(v, fx.Node)}
    return site.kind, str(site.node.target), str(sorted(rest.items()))


def _scaled(node: fx.Node) -> bool:
    named = arguments(node)
    return any(named.get(key, 1) != 1 for key in ("alpha", "beta"))


def _bias(site: Site) -> fx.Node | None:
    named = arguments(site.node)
    found = named["self"] if site.node.target is aten.addmm.default else named.get("bias")
    return found if isinstance(found, fx.Node) else None


def _layer(model: Model, uses: list[Site], values: dict[str, Any], scale: float) -> FactorLayer:
    first = uses[0]
    weight = in_groups(first, tensor_of(model.graph, first.weight).detach())
    place = [0.0, 0.0, 0.0]
    for site in uses:
        x, y = values[site.input.name], values[site.node.name]
        channels = (weight.shape[0] * weight.shape[2], weight.shape[0] * weight.shape[1])
        place[0] += x.numel() / channels[0] * scale
        place[1] += y.numel() / channels[1] * scale
        if len(weight.shape) == 5:
            place[2] += y.numel() / channels[1] / y.shape[-1] * x.shape[-1] * scale
    return FactorLayer(tuple(uses), weight, place[0], place[1], place[2])


def in_groups(site: Site, weight: Tensor) -> Tensor:
    """The weight as (N, O, C, *kernel)."""
    if site.kind in ("matmul", "embedding"):
        return weight.T[None]
    parts = weight.unflatten(0, (groups_of(site), -1))
    return parts.transpose(1, 2) if site.kind == "conv_transpose" else parts
