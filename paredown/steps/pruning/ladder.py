"""The order in which the units of coupled groups are cut, from the least worth to the most."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.graph.coupling.coupling import Choice
from paredown.graph.coupling.groups import Group

# Kernels are quickest where a width is a multiple of these (benchmarks/widths.py: in float, 72
# channels take 1.7 times as long as 64, and 62 as long as 64 and a third more; integers mind less).
CHANNELS, WIDE = 8, 16


# --- mathematics -----------------------------------------------------------------------------


def widths(size: int, least: int, multiple: int) -> list[int]:
    """The widths that a group may be cut to, from wide to narrow.

    Multiples, where the group has at least two of them; any width where it is smaller.

    Example:
        >>> widths(20, 3, 8), widths(6, 3, 8)
        ([16, 8], [5, 4, 3])
    """
    multiple = multiple if size >= 2 * multiple else 1
    return [width for width in range(size - 1, max(least, 1) - 1, -1) if width % multiple == 0]


def comparable(scores: Tensor) -> Tensor:
    """Scores over their mean.

    A layer's weights can be ten times another's without its channels mattering ten times as much
    (a batch norm behind it takes the factor out), so only how a unit stands beside the others of
    its group is compared across groups. Scores that are all zero stay zero.

    Shapes: (units,) -> (units,).

    Example:
        >>> comparable(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 1.5000])
    """
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def prices(scores: Tensor, narrower: Sequence[int]) -> Tensor:
    """What each cut to the next of the narrower widths takes: the mean score of its units.

    Shapes: scores (units,) -> (len(narrower),), rising.

    Example:
        >>> prices(torch.tensor([4.0, 1.0, 2.0, 3.0]), [3, 1])
        tensor([1.0000, 2.5000])
    """
    gone = [0, *(len(scores) - width for width in narrower)]
    rising = scores.sort().values
    means = [rising[a:b].mean() for a, b in itertools.pairwise(gone)]
    # rounding must not let a later cut come out cheaper than the one that it follows
    return torch.stack(means).cummax(0).values


def largest(scores: Tensor, width: int) -> Tensor:
    """True for the ``width`` units of highest score; of equal ones those of higher index stay.

    Shapes: (units,) -> (units,) bool.

    Example:
        >>> largest(torch.tensor([2.0, 5.0, 1.0, 2.0]), 2)
        tensor([False,  True, False,  True])
    """
    stays = torch.ones_like(scores, dtype=torch.bool)
    stays[scores.argsort(stable=True)[: len(scores) - width]] = False
    return stays


# --- the order of the cuts -------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """The cut of one group to its next narrower width; those of lower price come first."""

    price: float
    group: int  # its place among the groups
    width: int
    units: int  # that go with this cut


@dataclass(frozen=True)
class Ladder:
    """All cuts in their order: the first ``n`` of them are a choice, for every ``n``."""

    groups: tuple[Group, ...]
    scores: tuple[Tensor, ...]  # (units,) of each group
    rungs: tuple[Rung, ...]

    def __len__(self) -> int:
        return len(self.rungs)

    def choice(self, count: int) -> Choice:
        """The units that stay after the first ``count`` cuts."""
        narrowest = {rung.group: rung.width for rung in self.rungs[:count]}
        return {
            self.groups[place].name: largest(self.scores[place], width).cpu().numpy()
            for place, width in narrowest.items()
        }

    def first(self, reaches: Callable[[Choice], bool]) -> int:
        """The least count of cuts whose choice reaches an amount, or ``len(self) + 1``."""
        counts = range(1, len(self) + 1)
        return 1 + bisect.bisect_left(counts, True, key=lambda n: reaches(self.choice(n)))


def ladder(
    groups: Sequence[Group], scores: Sequence[Tensor], narrower: Sequence[Sequence[int]], scope: str
) -> Ladder:
    """Order the cuts: "global" by what they take, "uniform" by the share gone of their group."""
    rungs = []
    for place, (score, allowed) in enumerate(zip(scores, narrower, strict=True)):
        if not allowed:
            continue
        size = len(score)
        shares = [1 - width / size for width in allowed]
        order = shares if scope == "uniform" else prices(comparable(score), allowed).tolist()
        rungs += [
            Rung(price, place, width, wider - width)
            for price, (wider, width) in zip(
                order, itertools.pairwise([size, *allowed]), strict=True
            )
        ]
    rungs.sort(key=lambda rung: (rung.price, rung.group, -rung.width))
    return Ladder(tuple(groups), tuple(scores), tuple(rungs))
