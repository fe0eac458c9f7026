"""What one entry of the architecture list holds, and the inputs that many of them share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = tuple | dict


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How to build a small model of one architecture, and what to call it with.

    `example` gives a batch of two, the batch being dimension 0 of every input: a tuple of
    positional tensors or a dict of keyword tensors. `dynamic` has the same structure and names the
    dimensions besides the batch that may change, `{dim: name}` or None for each input, and `fixed`
    those of these names whose size `torch.export` fixes all the same, if only by a guard.
    """

    build: Callable[[], nn.Module]
    example: Callable[[], Inputs]
    family: str
    dynamic: Inputs | None = None
    fixed: tuple[str, ...] = ()


def images(size: int = 32, channels: int = 3) -> Callable[[], Inputs]:
    """Inputs of one image tensor, (2, channels, size, size)."""
    return lambda: (torch.randn(2, channels, size, size),)


def series(*shape: int) -> Callable[[], Inputs]:
    """Inputs of one real tensor of the given shape for each of two examples, (2, *shape)."""
    return lambda: (torch.randn(2, *shape),)


def token_ids(length: int = 16, vocabulary: int = 64) -> Tensor:
    """Two sequences of token numbers, (2, length), none of them a low, special one."""
    return torch.randint(4, vocabulary, (2, length))


def padding_mask(length: int = 16) -> Tensor:
    """A mask for two sequences, (2, length), the second of them a quarter padding."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - length // 4 :] = 0
    return mask


def text(length: int = 16, vocabulary: int = 64) -> Callable[[], Inputs]:
    """Keyword inputs of a text model: token numbers and the padding mask, (2, length) each."""
    return lambda: {
        "input_ids": token_ids(length, vocabulary),
        "attention_mask": padding_mask(length),
    }


TEXT_LENGTH = {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
IMAGE_SIZE = ({2: "height", 3: "width"},)
