"""Adaptive pooling whose windows follow the size of what comes in.

PyTorch's own decompositions take the size of the example for that of every input: a file whose
images vary would pool them in windows of the example's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

aten = torch.ops.aten
Size = Any  # an int or a torch.SymInt


def adaptive_mean(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """The means of windows, (..., *sizes): window i of k along n places begins at floor(i n / k)
    and ends at ceil((i + 1) n / k), as those of `torch.nn.AdaptiveAvgPool2d`.

    Example:
        >>> adaptive_mean(torch.arange(5.0).reshape(1, 1, 5), [2])
        tensor([[[1., 3.]]])
    """
    for dim, size in enumerate(sizes, x.dim() - len(sizes)):
        if size == 1:
            x = x.mean(dim, keepdim=True)
        elif not _same(size, x.shape[dim]):
            inside = _windows(x, dim, size).to(x.dtype)  # (n, k)
            x = (x.movedim(dim, -1) @ (inside / inside.sum(0))).movedim(-1, dim)
    return x


def adaptive_maximum(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """The largest values of the same windows, (..., *sizes).

    Example:
        >>> adaptive_maximum(torch.arange(5.0).reshape(1, 1, 5), [2])
        tensor([[[2., 4.]]])
    """
    for dim, size in enumerate(sizes, x.dim() - len(sizes)):
        if size == 1:
            x = x.amax(dim, keepdim=True)
        elif not _same(size, x.shape[dim]):
            inside = _windows(x, dim, size).T  # (k, n)
            places = x.movedim(dim, -1).unsqueeze(-2)  # (..., 1, n)
            x = places.masked_fill(~inside, -torch.inf).amax(-1).movedim(-1, dim)
    return x


def _windows(x: Tensor, dim: int, size: Size) -> Tensor:
    """Which of n places lie in which of k windows, (n, k)."""
    count, window = x.shape[dim], torch.arange(size, device=x.device)
    begin = torch.div(window * count, size, rounding_mode="floor")
    end = torch.div((window + 1) * count + size - 1, size, rounding_mode="floor")
    place = torch.arange(count, device=x.device)[:, None]
    return (place >= begin) & (place < end)


def _same(one: Size, other: Size) -> bool:
    """Whether two sizes are the same whatever they are; nothing is taken for true of them."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return (
        not isinstance(one, torch.SymInt) and not isinstance(other, torch.SymInt) and one == other
    )


def _maximum(x: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
    found = adaptive_maximum(x, sizes)
    return found, torch.zeros_like(found, dtype=torch.int64)  # read by nobody, see `function_of`


def _mean_in_three(x: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Of three dimensions, which exporters lack."""
    places = x.shape[-3:]
    fixed = not any(isinstance(each, torch.SymInt) for each in (*places, *sizes))
    if fixed and not any(n % size for n, size in zip(places, sizes, strict=True)):
        return F.avg_pool3d(x, [n // size for n, size in zip(places, sizes, strict=True)])
    return adaptive_mean(x, sizes)


POOLS: dict[Any, tuple[int, Callable[..., Any]]] = {  # op -> the dimensions that it pools, and how
    aten.adaptive_avg_pool1d.default: (1, adaptive_mean),
    aten.adaptive_avg_pool2d.default: (2, adaptive_mean),
    aten._adaptive_avg_pool2d.default: (2, adaptive_mean),
    aten.adaptive_avg_pool3d.default: (3, _mean_in_three),
    aten._adaptive_avg_pool3d.default: (3, _mean_in_three),
    aten.adaptive_max_pool1d.default: (1, _maximum),
    aten.adaptive_max_pool2d.default: (2, _maximum),
    aten.adaptive_max_pool3d.default: (3, _maximum),
}


def function_of(node: fx.Node) -> Callable[..., Any] | None:
    """What a node is made of that pools places whose number varies, or means of three dimensions;
    None of any other, and where somebody asks in which places the largest values lie."""
    count, function = POOLS.get(node.target, (0, None))
    if function is None:
        return None
    value: Any = node.args[0]
    varies = any(isinstance(n, torch.SymInt) for n in value.meta["val"].shape[-count:])
    places = any(user.args[1:] == (1,) and user.users for user in node.users)
    maximum = function is _maximum
    wanted = (varies and not (maximum and places)) or function is _mean_in_three
    return function if wanted else None
