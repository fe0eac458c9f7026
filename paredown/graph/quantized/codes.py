"""Whole numbers of a few bits, several to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Numbers (..., N) below ``2 ** bits`` -> bytes (..., ceil(N * bits / 8)), uint8; the first of
    a row lies lowest in its first byte, and the last byte is filled up with zeros.

    Args:
        bits: 1, 2, 4 or 8.

    Example:
        >>> to_bytes(torch.tensor([[1, 2, 3], [4, 5, 6]]), 4)
        tensor([[33,  3],
                [84,  6]], dtype=torch.uint8)
    """
    each = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (padded.unflatten(-1, (-1, each)) << shifts).sum(-1, dtype=torch.uint8)


def from_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The numbers (..., count) that `to_bytes` has packed, uint8.

    Example:
        >>> from_bytes(to_bytes(torch.tensor([1, 2, 3]), 4), 4, 3)
        tensor([1, 2, 3], dtype=torch.uint8)
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :count]
