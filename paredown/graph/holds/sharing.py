"""Which elements of one weight are one value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paredown.graph.rows import from_rows

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
        codes: (R, F / block), for each block of a row (see `paredown.graph.rows`) the number of
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
