"""Inputs that a file can be run with, made from what it declares of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paredown.graph.doors.opened import Wanted

SIZES = (16, 8, 32, 64, 128, 224, 256, 4, 2, 1, 512)  # that dimensions of no fixed size may have
IMAGE_SIZES = (32, 64, 224, 128, 256, 512, 640, 16, 8)
LARGEST = 1 << 26  # numbers of an input that is made; a larger one is left to the caller


def tries(inputs: tuple[Wanted, ...]) -> Iterator[dict[str, Tensor]]:
    """Inputs at one size after another, a batch of one, until the model runs at one."""
    seen = set()
    batches = frozenset(e.shape[0] for e in inputs if e.shape and isinstance(e.shape[0], str))
    images = any(len(each.shape) == 4 for each in inputs)
    for size in IMAGE_SIZES + SIZES if images else SIZES:
        shapes = tuple(shape_of(each, size, batches) for each in inputs)
        if shapes in seen:
            continue
        seen.add(shapes)
        if all(torch.Size(shape).numel() <= LARGEST for shape in shapes):
            yield {
                each.name: made(shape, each.dtype)
                for each, shape in zip(inputs, shapes, strict=True)
            }


def shape_of(
    wanted: Wanted, size: int, batches: frozenset[int | str | None] = frozenset()
) -> tuple[int, ...]:
    """The declared shape with this size where there is none; the batch, by its names, is 1.

    Example:
        >>> shape_of(Wanted("x", "float32", ("batch", 3, None)), 8)
        (1, 3, 8)
    """
    sizes = [
        each if isinstance(each, int) else 1 if each in batches else size for each in wanted.shape
    ]
    if sizes and not isinstance(wanted.shape[0], int):
        sizes[0] = 1
    if (
        len(sizes) == 4
        and not isinstance(wanted.shape[1], int)
        and isinstance(wanted.shape[2], int)
    ):
        sizes[1] = 3
    return tuple(sizes)


def made(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Zeros where they are whole numbers, else numbers about zero that are the same each time."""
    kind: torch.dtype = getattr(torch, dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(kind)


def dynamic(inputs: tuple[Wanted, ...]) -> dict[str, dict[int, str] | None] | None:
    """The dimensions besides the batch that the file leaves open, by their names there."""
    found = {
        each.name: {
            dim: size if isinstance(size, str) else f"{each.name}_{dim}"
            for dim, size in enumerate(each.shape)
            if dim and not isinstance(size, int)
        }
        or None
        for each in inputs
    }
    return found if any(found.values()) else None
