"""Group lasso over coupled groups: training that drives whole units to nothing.

A unit (a channel, a neuron, a head) is all weights that go with it: those that make it and those
that read it (Wen et al., arXiv 1608.03665; coupled as in DepGraph, arXiv 2301.12900). After each
step of the optimiser the penalty is applied by itself, as its proximal map: a gradient of it
would be rescaled by AdamW, which then shrinks all units alike, and would never reach zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph.coupling.coupling import analyze
from paredown.graph.coupling.groups import Group, Member
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import quantizers
from paredown.train.parameters import trainable

ALPHA = 4.0  # DepGraph's: the weakest unit of a group is pressed 2^4 times as hard as the strongest


# --- mathematics -----------------------------------------------------------------------------


def squares(weight: Tensor, dim: int) -> Tensor:
    """The sum of squares at each index of one dimension, in single precision.

    Shapes: weight (...) -> (size of ``dim``,).

    Example:
        >>> squares(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 1)
        tensor([10.,  4.])
    """
    others = [d for d in range(weight.dim()) if d != dim]
    total = weight.float().square()
    return total.sum(others) if others else total


def proximal(norms: Tensor, thresholds: Tensor) -> Tensor:
    """What the proximal map of the group lasso multiplies each unit's weights by.

    ``w * max(0, 1 - t / ||w||)`` is the v that makes ``||v - w||^2 / 2 + t ||v||`` least (Yuan &
    Lin 2006); a norm at or below the threshold gives exactly zero.

    Shapes: norms (units,), thresholds (units,) -> (units,).

    Example:
        >>> proximal(torch.tensor([5.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5]))
        tensor([0.8000, 0.0000, 0.0000])
    """
    return (1 - thresholds / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)


def pressure(norms: Tensor, group: Tensor, groups: int, alpha: float = ALPHA) -> Tensor:
    """How much harder weak units are pressed: 2 to the power of
    ``alpha (max - norm) / (max - min)``, over the units of each group (DepGraph, arXiv 2301.12900).

    Shapes: norms (units,), group (units,), the number of each unit's group -> (units,).

    Example:
        >>> pressure(torch.tensor([1.0, 3.0, 2.0, 7.0]), torch.tensor([0, 0, 0, 1]), 2)
        tensor([16.,  1.,  4.,  1.])
    """
    least = norms.new_full((groups,), torch.inf).scatter_reduce(0, group, norms, "amin")[group]
    most = norms.new_zeros(groups).scatter_reduce(0, group, norms, "amax")[group]
    span = (most - least).clamp(min=torch.finfo(norms.dtype).tiny)
    return torch.exp2(alpha * (most - norms) / span)


# --- on a model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A dimension of a weight; ``unit`` (its size,) is the number of the unit that each index goes
    with, or the number of units where it goes with none."""

    weight: nn.Parameter
    dim: int
    unit: Tensor


@dataclass(frozen=True)
class Lasso:
    """The units of a model, ready to be shrunk.

    ``group`` (units,) numbers each unit's group. ``scale`` (units,) is the mean norm of its group
    when training began, so that one strength suits small and large layers: within a group each
    unit has as many weights, and the usual factor, the root of their number, tells it nothing.
    """

    strength: float
    names: tuple[str, ...]  # of the groups
    places: tuple[Place, ...]
    group: Tensor
    scale: Tensor

    @torch.no_grad()
    def norms(self) -> Tensor:
        """(units,) of all weights that go with each unit."""
        parts = [squares(place.weight, place.dim) for place in self.places]
        total = self.group.new_zeros(len(self.group) + 1, dtype=torch.float32)
        units = torch.cat([place.unit for place in self.places])
        return total.index_add_(0, units, torch.cat(parts))[:-1].sqrt()

    @torch.no_grad()
    def shrink(self, lr: float) -> None:
        """One proximal step; a weight that goes with units of two groups is shrunk by both."""
        norms = self.norms()
        harder = pressure(norms, self.group, len(self.names))
        factors = proximal(norms, lr * self.strength * self.scale * harder)
        factors = torch.cat([factors, factors.new_ones(1)])
        for place in self.places:
            shape = [-1 if d == place.dim else 1 for d in range(place.weight.dim())]
            place.weight.mul_(factors[place.unit].reshape(shape))

    def zeros(self) -> int:
        """How many units are exactly zero.

        Raises:
            UserError: all units of a group are, so that nothing passes through it any more.
        """
        zero = self.norms() == 0
        for number, name in enumerate(self.names):
            inside = self.group == number
            if bool(zero[inside].all()) and bool(self.scale[inside].any()):  # not so from the start
                raise UserError(
                    f"group_lasso: {self.strength:g} has driven every unit of {name!r} to zero; "
                    "use a lower strength, a lower lr or fewer epochs."
                )
        return int(zero.sum())

    def to(self, device: torch.device) -> Lasso:
        """After the model's parameters have moved there."""
        places = tuple(replace(place, unit=place.unit.to(device)) for place in self.places)
        group, scale = self.group.to(device), self.scale.to(device)
        return replace(self, places=places, group=group, scale=scale)


def units_of(model: Model, strength: float) -> Lasso:
    """What the lasso shrinks: the units that `PruneChannels` could cut, with what trains of them.

    Raises:
        UserError: the model has no such units, or is quantized.

    Example:
        >>> import paredown
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lasso = units_of(paredown.capture(net, (torch.zeros(1, 4),)), 1.0)
        >>> lasso.names, len(lasso.group), [place.dim for place in lasso.places]
        (('0',), 8, [0, 1])
    """
    if quantizers(model.graph):
        raise UserError(
            "group_lasso: the model is quantized, so its channels cannot be cut any more; train "
            "with it before Quantize, or set group_lasso=0."
        )
    named = trainable(model)
    found = [(group, list(_members(group, named))) for group in analyze(model).groups]
    found = [(group, members) for group, members in found if members]
    if not found:
        raise UserError(
            "group_lasso: the model has no channels that train and can be cut, so there is nothing "
            "to shrink; set group_lasso=0."
        )
    sizes = torch.tensor([group.size for group, _ in found])
    lasso = Lasso(
        strength,
        tuple(group.name for group, _ in found),
        tuple(_places(found, named, int(sizes.sum()))),
        torch.arange(len(found)).repeat_interleave(sizes),
        torch.empty(0),
    ).to(next(iter(named.values())).device)
    norms = lasso.norms()
    means = norms.new_zeros(len(found)).index_add_(0, lasso.group, norms) / sizes.to(norms.device)
    return replace(lasso, scale=means[lasso.group])


def _members(group: Group, named: dict[str, nn.Parameter]) -> Iterator[Member]:
    """The weights that make and read the units; where it has none (stacked experts), any."""
    weights = [m for m in group.members if m.name in named and named[m.name].dim() > 1]
    yield from [m for m in weights if m.role in ("out", "in")] or weights


def _places(
    found: list[tuple[Group, list[Member]]], named: dict[str, nn.Parameter], units: int
) -> Iterator[Place]:
    """Each dimension once, whichever groups share it."""
    owners: dict[tuple[str, int], Tensor] = {}
    start = 0
    for group, members in found:
        numbers = torch.arange(start, start + group.size)[:, None]  # (units of the group, 1)
        for member in members:
            key, size = (member.name, member.dim), named[member.name].shape[member.dim]
            unit = owners.setdefault(key, torch.full((size,), units))
            unit[torch.as_tensor(member.indices).long()] = numbers
        start += group.size
    for (name, dim), unit in owners.items():
        yield Place(named[name], dim, unit)
