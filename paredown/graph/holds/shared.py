"""Weights that are one value: which of them go together, and the values that they have in common.

A model keeps shared weights as plain tensors under their own names, so that every op, step and
runtime sees what it always sees; ``Model.shared`` says which of their elements are equal, as
``Model.masks`` says which are zero. Training holds it (`paredown.graph.holds.ties`), a step that
breaks it is refused, and a file keeps the values and their numbers alone
(`paredown.graph.holds.shared_store`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.holds.sharing import Sharing, member_sums, small
from paredown.graph.parts import Parts
from paredown.graph.rows import rows
from paredown.graph.sites import sites
from paredown.graph.state import getattr_or_none, tensor_of


@dataclass(frozen=True)
class Part:
    """A weight of a book: its tensor, and the value, sign and mask of each element, (N,)."""

    name: str
    weight: Tensor
    members: Tensor
    signs: Tensor | None
    kept: Tensor | None

    def signed(self, values: Tensor) -> Tensor:
        """(N,) of anything that is linear in the weights, in terms of their values."""
        return values if self.signs is None else values * self.signs.to(values.dtype)

    def expanded(self, values: Tensor) -> Tensor:
        """Values (size,) -> the weight."""
        made = self.signed(values.to(self.weight.dtype)[self.members])
        if self.kept is not None:
            made = torch.where(self.kept, made, torch.zeros_like(made))
        return made.reshape(self.weight.shape)


@dataclass(frozen=True)
class Book:
    """All weights that share the values of one codebook, of one dtype."""

    name: str
    size: int
    parts: tuple[Part, ...]

    def values(self) -> Tensor:
        """The mean of the weights that share each value, (size,); 0 where there are none.

        It is in double precision, where the mean of equal numbers is that number.
        """
        device = self.parts[0].weight.device
        total, count = torch.zeros(2, self.size, dtype=torch.float64, device=device)
        for part in self.parts:
            flat = part.signed(part.weight.detach().reshape(-1).double())
            there = torch.ones_like(flat) if part.kept is None else part.kept.double()
            total += member_sums(flat * there, part.members, self.size)
            count += member_sums(there, part.members, self.size)
        return total / count.clamp(min=1)


# --- of a model ------------------------------------------------------------------------------


def books(model: Parts) -> Iterator[Book]:
    """The codebooks of a model, in the order of their first weights, one in memory at a time.

    What `Cast` has left in 32 bits has values of its own from then on. A weight that a later step
    has put something else in the place of is passed over.
    """
    found: dict[tuple[str, torch.dtype], list[str]] = {}
    for name, sharing in model.shared.items():
        weight = getattr_or_none(model.graph, name)
        if weight is not None and sharing.fits(weight):
            found.setdefault((sharing.book, weight.dtype), []).append(name)
    for (book, kind), names in found.items():
        parts = tuple(_part(model, name) for name in names)
        size = model.shared[names[0]].size
        yield Book(f"{book}:{str(kind).removeprefix('torch.')}", size, parts)


def _part(model: Parts, name: str) -> Part:
    weight, sharing = tensor_of(model.graph, name), model.shared[name]
    signs, mask = sharing.signs(weight.shape), model.masks.get(name)
    return Part(
        name,
        weight,
        sharing.members(weight.shape).to(weight.device),
        None if signs is None else signs.to(weight.device),
        None if mask is None or bool(mask.all()) else mask.to(weight.device).reshape(-1),
    )


def hold(model: Parts) -> None:
    """Give all weights that share a value their mean, in place."""
    with torch.no_grad():
        for book in books(model):
            values = book.values()
            for part in book.parts:
                part.weight.copy_(part.expanded(values))


def apart(model: Parts) -> Iterator[str]:
    """The names of weights that do not share their values any more."""
    for book in books(model):
        values = book.values()
        for part in book.parts:
            if not torch.equal(part.expanded(values), part.weight.detach()):
                yield part.name


def regroup(model: Parts) -> None:
    """Weights whose channels were scaled share their values in each output channel from now on."""
    axes = {site.weight: site.axis for site in sites(model.graph)}
    for name in list(apart(model)):
        weight = tensor_of(model.graph, name).detach()
        flat = rows(weight, axes[name])
        made, start = torch.empty(flat.shape, dtype=torch.int64), 0
        for row, values in enumerate(flat):
            distinct, codes = torch.unique(values, return_inverse=True)
            made[row] = codes + start
            start += len(distinct)
        model.shared[name] = Sharing(name, start, small(made), axes[name])


def refuse_shared(model: Parts, names: Sequence[str], what: str) -> None:
    """That none of these weights is shared.

    Raises:
        UserError: one is; ``what`` begins the sentence and says what to do.
    """
    shared = {id(part.weight): part for book in books(model) for part in book.parts}
    for name in names:
        part = shared.get(id(getattr_or_none(model.graph, name)))
        if part is not None:
            hashes = part.signs is not None
            kind = "hashed to a few buckets" if hashes else "shared among a few values"
            raise UserError(what.format(f"the weights of {name!r} are {kind}"))
