"""Weights that are one value: which of them go together, and the values that they have in common.

A model keeps shared weights as plain tensors under their own names, so that every op, step and
runtime sees what it always sees; ``Model.shared`` says which of their elements are equal, as
``Model.masks`` says which are zero. Training holds it (`paredown.ties`), a step that breaks it is
refused (`paredown.recipe`), and a file keeps the values and their numbers alone
(`paredown.graph.shared_store`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paredown.graph.edit import getattr_or_none
from paredown.graph.grouped import from_rows, rows
from paredown.graph.sites import sites, tensor_of
from paredown.types import UserError

if TYPE_CHECKING:
    from paredown.graph.model import Model

MASK = 2**32 - 1

# --- mathematics -----------------------------------------------------------------------------


def mixed(numbers: Tensor) -> Tensor:
    """Whole numbers below 2^32 (...) to others that look random: xor-shifts and products.

    No product leaves int64, so every machine gives the same. It is a bijection.

    Example:
        >>> mixed(torch.tensor([0, 1, 2]))
        tensor([         0,  824515495, 1722258072])
    """
    for _ in range(2):
        numbers = ((numbers >> 16) ^ numbers) * 0x45D9F3B & MASK
    return (numbers >> 16) ^ numbers


def hashed(count: int, buckets: int, seed: int) -> tuple[Tensor, Tensor]:
    """The bucket and the sign of each of ``count`` weights (HashedNets, arXiv 1504.04788, section
    4.3): two hashes of its place, of which the sign takes away what collisions add up to.

    Returns:
        buckets (count,) int64, and signs (count,), 1 or -1, float32.

    Example:
        >>> hashed(4, 3, seed=0)
        (tensor([1, 0, 0, 1]), tensor([ 1.,  1., -1., -1.]))
    """
    first = mixed(torch.arange(1, count + 1) ^ int(mixed(torch.tensor(seed & MASK))))
    second = mixed(first ^ 0x5BD1E995)
    return first % buckets, 1.0 - 2.0 * (second & 1)


def member_sums(values: Tensor, members: Tensor, size: int) -> Tensor:
    """The sum over the weights of each value: what gradients of weights are to the values that
    they share (Deep Compression, arXiv 1510.00149, section 3.2).

    Shapes: values (N,), members (N,) below ``size`` -> (size,).

    Example:
        >>> member_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]), 2)
        tensor([2., 5.])
    """
    return values.new_zeros(size).index_add_(0, members, values)


# --- of one tensor ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Sharing:
    """Which elements of a weight are one value.

    Attributes:
        book: the name of the codebook; weights of one book share its values.
        size: how many numbers the book holds.
        codes: (R, F / block), for each block of a row (see `paredown.graph.grouped`) the number of
            its run of ``block`` values in the book; None where buckets are hashed.
        axis: the dimension of the weight that rows run over.
        seed: of the hash.

    Example:
        >>> sharing = Sharing("fc.weight", 4, torch.tensor([[1, 0]]), block=2)
        >>> sharing.members((1, 4))
        tensor([2, 3, 0, 1])
    """

    book: str
    size: int
    codes: Tensor | None = None
    axis: int = 0
    block: int = 1
    seed: int = 0

    def members(self, shape: Sequence[int]) -> Tensor:
        """The number of each element's value in the book, (N,) int64 in the weight's order."""
        if self.codes is None:
            return hashed(math.prod(shape), self.size, self.seed)[0]
        runs = self.codes.long()[..., None] * self.block + torch.arange(self.block)
        like = torch.empty(tuple(shape), device="meta")
        return from_rows(runs.flatten(1), like, self.axis).reshape(-1)

    def fits(self, weight: Tensor) -> bool:
        """Whether codes are for a weight of that many elements; hashes are for any."""
        return self.codes is None or self.codes.numel() * self.block == weight.numel()

    def signs(self, shape: Sequence[int]) -> Tensor | None:
        """What the value of each element is multiplied by, (N,), where buckets are hashed."""
        return hashed(math.prod(shape), self.size, self.seed)[1] if self.codes is None else None


def small(codes: Tensor) -> Tensor:
    """Whole numbers in the least bytes that hold them.

    Example:
        >>> small(torch.tensor([0, 255])).dtype, small(torch.tensor([256])).dtype
        (torch.uint8, torch.int16)
    """
    most = int(codes.max()) if codes.numel() else 0
    kinds = ((255, torch.uint8), (2**15 - 1, torch.int16), (2**31 - 1, torch.int32))
    return codes.to(next(kind for limit, kind in kinds if most <= limit))


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


def books(model: Model) -> Iterator[Book]:
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


def _part(model: Model, name: str) -> Part:
    weight, sharing = tensor_of(model.graph, name), model.shared[name]
    signs, mask = sharing.signs(weight.shape), model.masks.get(name)
    return Part(
        name,
        weight,
        sharing.members(weight.shape).to(weight.device),
        None if signs is None else signs.to(weight.device),
        None if mask is None or bool(mask.all()) else mask.to(weight.device).reshape(-1),
    )


def hold(model: Model) -> None:
    """Give all weights that share a value their mean, in place."""
    with torch.no_grad():
        for book in books(model):
            values = book.values()
            for part in book.parts:
                part.weight.copy_(part.expanded(values))


def apart(model: Model) -> Iterator[str]:
    """The names of weights that do not share their values any more."""
    for book in books(model):
        values = book.values()
        for part in book.parts:
            if not torch.equal(part.expanded(values), part.weight.detach()):
                yield part.name


def regroup(model: Model) -> None:
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


def refuse_shared(model: Model, names: Sequence[str], what: str) -> None:
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
