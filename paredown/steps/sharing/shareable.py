"""Which weights of a model can be shared, and which of their elements are zero and stay so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph import lazily
from paredown.graph.holds import own_zeros
from paredown.graph.holds.shared import refuse_shared
from paredown.graph.model import Model
from paredown.graph.names import check_exclude, fits, with_layer
from paredown.graph.quantized.quantizers import quantizers
from paredown.graph.sites import Site, sites
from paredown.graph.state import tensor_of


@dataclass(frozen=True)
class Shareable:
    """A trainable weight with all its uses, and False for each element that is pruned."""

    weight: Tensor
    uses: tuple[Site, ...]
    kept: Tensor

    @property
    def name(self) -> str:
        return self.uses[0].weight


def shareable(model: Model, exclude: Sequence[str], step: str) -> list[Shareable]:
    """The float weights that ops multiply with or look up, in the order they run.

    Raises:
        UserError: a pattern fits no name; a quantized model; weights that are shared already; NaN
            in a weight; no weight is left.
    """
    if quantizers(model.graph):
        raise UserError(f"{step}: the model is quantized already; share weights before.")
    groups: dict[int, list[Site]] = {}
    for site in sites(model.graph):
        groups.setdefault(id(tensor_of(model.graph, site.weight)), []).append(site)
    names = (n for uses in groups.values() for site in uses for n in with_layer(site.weight))
    check_exclude(exclude, names, "layer or weight")
    found = [_one(model, uses) for uses in groups.values() if not _spared(model, uses, exclude)]
    if not found:
        raise UserError(
            f"{step}: the model has no weight to share"
            + (" besides those excluded." if exclude else ".")
        )
    names_left = [each.name for each in found]
    refuse_shared(model, names_left, f"{step}: {{}} already; exclude them.")
    return found


def _spared(model: Model, uses: list[Site], exclude: Sequence[str]) -> bool:
    weight = tensor_of(model.graph, uses[0].weight)
    trained = isinstance(weight, nn.Parameter) and weight.is_floating_point()
    if not trained or not bool((weight != 0).any()):  # a layer that starts at zero is to train
        return True
    return fits([n for site in uses for n in with_layer(site.weight)], exclude)


def _one(model: Model, uses: list[Site]) -> Shareable:
    weight = tensor_of(model.graph, uses[0].weight)
    if not lazily.finite(weight):
        raise UserError(f"model: {uses[0].weight!r} holds NaN or infinite weights.")
    kept = own_zeros.kept(weight)
    for site in uses:
        if site.weight in model.masks:
            kept = kept & model.masks[site.weight].to(weight.device)
    return Shareable(weight, tuple(uses), kept)


def keep_zeros(model: Model, found: Shareable) -> None:
    """What is pruned is zero from now on: a value of its own that stays what it is."""
    if not bool(found.kept.all()):
        for site in found.uses:
            model.masks[site.weight] = found.kept


def flat(found: Shareable) -> Tensor:
    """The elements that are not pruned, (N,)."""
    return torch.masked_select(found.weight.detach(), found.kept)
