"""What a layer multiplies its weight with, at each place of its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from paredown.graph.ops import argument
from paredown.graph.sites import Site


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Tensor:
    """What a convolution multiplies its weight with, at each place of its output, as a view.

    Shapes: x (B, C, *sizes), one entry for each size; -> (B, *output sizes, C, *kernel).

    Example:
        >>> import torch
        >>> patches(torch.arange(4.0).reshape(1, 1, 4), [2], [1], [(0, 1)], [2])[0, :, 0].tolist()
        [[0.0, 2.0], [1.0, 3.0], [2.0, 0.0]]
    """
    spaces = len(kernel)
    x = F.pad(x, [side for pair in reversed(padding) for side in pair])
    for dim, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + dim, (size - 1) * spread + 1, step)[..., ::spread]
    return x.movedim(1, 1 + spaces)


def _each(value: Any, count: int) -> list[int]:
    """One entry for each of ``count`` dimensions, where a single one may stand for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * count if len(values) == 1 else values


def layer_inputs(site: Site, weight: Tensor, x: Tensor) -> Tensor:
    """The site's input as a view: (*places, F) or, of a convolution, (*places, C, *kernel)."""
    if site.kind != "conv":
        return x
    kernel = weight.shape[2:]
    count = len(kernel)
    dilation = _each(argument(site.node, "dilation"), count)
    given = argument(site.node, "padding")
    if given == "same":  # of an odd total the larger half is at the end
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [(side, side) for side in _each(0 if given == "valid" else given, count)]
    return patches(x, kernel, _each(argument(site.node, "stride"), count), padding, dilation)


def groups_of(site: Site) -> int:
    """Of a grouped convolution how many, else one."""
    return argument(site.node, "groups") if "conv" in site.kind else 1
