"""Factors that an earlier step has made, as one weight again, to be factored anew or left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.holds.shared import refuse_shared
from paredown.graph.model import Model
from paredown.graph.names import fits, with_layer
from paredown.graph.sites import Site
from paredown.graph.state import tensor_of
from paredown.steps.low_rank.factor_layers import FactorLayer, in_groups
from paredown.steps.low_rank.factored import chains, join
from paredown.steps.low_rank.factors import Factors, product
from paredown.steps.low_rank.ranks import Option


@dataclass(frozen=True)
class Joined:
    """A weight that was in factors: how, and its bias aside, what they were."""

    method: str
    ranks: tuple[int, ...]
    factors: Factors

    def option(self, layer: FactorLayer) -> Option:
        """To factor the layer as it was, which loses nothing."""
        parameters, macs = layer.cost(self.method, self.ranks)
        saved = layer.weight.numel() - parameters
        made = self.factors
        return Option(self.method, self.ranks, saved, layer.macs - macs, 0.0, lambda: (made, None))


def rejoin(
    model: Model, include: Sequence[str], exclude: Sequence[str], lookups: bool = True
) -> dict[str, Joined]:
    """Join the factors of the layers that the patterns leave, in place; their weights by name.

    ``lookups``: those of embeddings too.

    Raises:
        UserError: a factor is pruned.
    """
    uses: dict[tuple[str, ...], list[list[Site]]] = {}
    for chain in chains(model.graph):
        names = with_layer(chain[0].weight.removesuffix("_down"))
        asked = not fits(names, exclude) and (not include or fits(names, include))
        if asked and (lookups or chain[0].kind != "embedding"):
            uses.setdefault(tuple(site.weight for site in chain), []).append(chain)
    check_free(model, [name for names in uses for name in names])
    found = {}
    for each in uses.values():
        factors = tuple(
            in_groups(site, tensor_of(model.graph, site.weight).detach()) for site in each[0]
        )
        dense = product([factor.double() for factor in factors])
        weight = _laid_out(each[0][0], dense).to(factors[0].dtype).contiguous()
        name = join(model, each, weight)
        found[name] = Joined(_method(factors), _ranks(factors), factors)
    return found


def check_free(model: Model, names: Sequence[str]) -> None:
    """Refuse weights that a mask holds at zero, or that share their values."""
    for name in names:
        if name in model.masks:
            raise UserError(
                f"LowRank: {name!r} is pruned, and the product of factors has no zeros; factor "
                "before PruneWeights, or exclude it."
            )
    refuse_shared(
        model, names, "LowRank: {}, which factors do not keep; factor before, or exclude it."
    )


def _method(factors: Factors) -> str:
    if len(factors) == 3:
        return "tucker"
    return "spatial" if factors[1].shape[3:].numel() > 1 else "channel"


def _ranks(factors: Factors) -> tuple[int, ...]:
    return tuple(factor.shape[1] for factor in factors[:-1])


def _laid_out(first: Site, dense: Tensor) -> Tensor:
    """The whole weight as the first op of its chain takes one."""
    if first.kind in ("matmul", "embedding"):
        return dense[0].T
    return (dense.transpose(1, 2) if first.kind == "conv_transpose" else dense).flatten(0, 1)
