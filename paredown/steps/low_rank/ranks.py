"""Which ranks: what each would save of a layer and lose of its outputs, and the best over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from paredown.steps.low_rank.factors import Factors
from paredown.steps.pruning.ladder import CHANNELS, WIDE

# What makes the factors of an option, and by how much the bias then moves (O,), where there is one.
Make = Callable[[], tuple[Factors, Tensor | None]]


@dataclass(frozen=True)
class Option:
    """One way to factor a layer."""

    method: str  # "channel", "spatial" or "tucker"
    ranks: tuple[int, ...]  # of each group; two of a Tucker decomposition, in the order they run
    parameters: int  # saved
    macs: float  # multiply-adds saved at the example
    loss: float  # share of the energy of the layer's outputs
    make: Make = field(compare=False, repr=False)


def neat(ranks: Sequence[int], groups: int, round_to: int | None) -> list[int]:
    """Of the ranks those that make a multiple of ``round_to`` channels, or all where they are few.

    None asks for multiples of 16 from 64 channels on, of 8 below.

    Example:
        >>> neat(range(1, 40), 1, None), neat(range(1, 12), 1, 8), neat(range(60, 90), 1, None)
        ([8, 16, 24, 32], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [64, 80])
    """

    def fits(rank: int) -> bool:
        usual = WIDE if rank * groups >= 4 * WIDE else CHANNELS
        return rank * groups % (round_to or usual) == 0

    found = [rank for rank in ranks if fits(rank)]
    return found if len(found) > 1 else list(ranks)


def penalty(loss: float) -> float:
    """What a layer's loss counts beside those of others: minus the logarithm of the energy left.

    The energies that layers keep multiply on the way to the output (Zhang et al. 1505.06798).

    Example:
        >>> penalty(0.0), round(penalty(0.5), 3)
        (0.0, 0.693)
    """
    return -math.log1p(-min(max(loss, 0.0), 1 - 1e-12))


def front(options: Sequence[Option], saving: Callable[[Option], float]) -> list[Option]:
    """The options of which none saves as much and loses less, from the one that saves least.

    Example:
        >>> pairs = [(8, 0.15), (6, 0.2), (7, 0.3), (4, 0.9), (11, 0.0)]
        >>> made = [Option("channel", (r,), 10 - r, 0, loss, None) for r, loss in pairs]
        >>> [option.ranks for option in front(made, lambda option: option.parameters)]
        [(8,), (6,), (4,)]
    """
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (-saving(o), o.loss)):
        if saving(option) > 0 and (not found or option.loss < found[-1].loss):
            found.append(option)
    return found[::-1]


def hull(options: Sequence[Option], saving: Callable[[Option], float]) -> list[Option]:
    """Of a `front` the lower convex hull of penalty over saving, which begins at the whole layer.

    Example:
        >>> pairs = [(8, 0.15), (6, 0.2), (4, 0.9)]
        >>> made = [Option("channel", (r,), 10 - r, 0, loss, None) for r, loss in pairs]
        >>> [option.ranks for option in hull(made, lambda option: option.parameters)]
        [(6,), (4,)]
    """
    points = [(0.0, 0.0)]
    found: list[Option] = []
    for option in options:
        point = saving(option), penalty(option.loss)
        while found and _slope(points[-2], points[-1]) >= _slope(points[-1], point):
            points.pop()
            found.pop()
        points.append(point)
        found.append(option)
    return found


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


@dataclass(frozen=True)
class Ranks:
    """The options of all layers, each layer's the `front` of its own."""

    fronts: tuple[tuple[Option, ...], ...]  # of each layer
    saving: Callable[[Option], float]
    weights: tuple[float, ...]  # of each layer's penalty beside the others'

    @property
    def most(self) -> float:
        """What all layers can save."""
        return sum(self.saving(options[-1]) for options in self.fronts if options)

    def choice(self, needed: float) -> dict[int, Option]:
        """For each layer that is to be factored, how: what loses least while ``needed`` is saved.

        Steps down the hulls are taken in the order of penalty per saved unit, the best there is for
        what they save together (a knapsack by Lagrange's multiplier). In place of the last, which
        may save far more than is needed, comes the step that reaches it at the least penalty.
        """
        chosen: dict[int, Option] = {}
        missing = needed
        for _, layer, option in self._steps():
            more = self.saving(option) - self._saved(chosen, layer)
            if more >= missing:
                return chosen | self._last(chosen, missing)
            chosen[layer] = option
            missing -= more
        return chosen

    def _steps(self) -> list[tuple[float, int, Option]]:
        steps = []
        for layer, options in enumerate(self.fronts):
            x, y = 0.0, 0.0
            for option in hull(options, self.saving):
                saved, lost = self.saving(option), self._price(layer, option)
                steps.append(((lost - y) / (saved - x), layer, option))
                x, y = saved, lost
        return sorted(steps, key=lambda step: step[:2])

    def _price(self, layer: int, option: Option | None) -> float:
        return self.weights[layer] * penalty(option.loss) if option else 0.0

    def _saved(self, chosen: dict[int, Option], layer: int) -> float:
        return self.saving(chosen[layer]) if layer in chosen else 0.0

    def _last(self, chosen: dict[int, Option], missing: float) -> dict[int, Option]:
        """One layer's option that saves what is missing, at the least penalty."""
        found = [
            (self._price(layer, option) - self._price(layer, chosen.get(layer)), layer, n)
            for layer, options in enumerate(self.fronts)
            for n, option in enumerate(options)
            if self.saving(option) - self._saved(chosen, layer) >= missing
        ]
        _, layer, place = min(found)
        return {layer: self.fronts[layer][place]}
