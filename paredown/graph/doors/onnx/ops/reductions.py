"""Ops that join many numbers into fewer, and those that order them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.graph.doors.onnx.call import Call

Function = Callable[[Tensor, list[int], bool], Tensor]


def reduce(function: Function, since: int = 18) -> Callable[[Call], Tensor]:
    """Over axes that were an attribute before they became an input."""

    def run(call: Call) -> Tensor:
        x, axes = call.tensor(0), call.axes(1, since)
        keep = bool(call.attribute("keepdims", 1))
        alone = call.attribute("noop_with_empty_axes", 0)
        if not axes:
            if alone:
                return _alone(function, x)
            axes = list(range(x.dim()))
        if not axes:
            return _alone(function, x)
        return function(x, axes, keep)

    return run


def _alone(function: Function, x: Tensor) -> Tensor:
    """Over no axis: each number by itself."""
    return function(x.unsqueeze(-1), [x.dim()], False)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.sum(axes, keepdim=keep)
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return x.double().mean(axes, keepdim=keep).to(x.dtype)
    return x.mean(axes, keepdim=keep)


def _max(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amax(axes, keepdim=keep)


def _min(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.amin(axes, keepdim=keep)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    kind = x.dtype
    for axis in sorted((each % max(x.dim(), 1) for each in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=kind)
    return x


def _l1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.abs().sum(axes, keepdim=keep, dtype=x.dtype)


def _l2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.linalg.vector_norm(x, 2, axes, keep)
    return x.double().square().sum(axes, keepdim=keep).sqrt().to(x.dtype)


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep).log()


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keep)


def _squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return (x * x).sum(axes, keepdim=keep, dtype=x.dtype)


def extreme(function: Callable[..., Tensor]) -> Callable[[Call], Tensor]:
    """The place of the largest or smallest number."""

    def run(call: Call) -> Tensor:
        x, axis = call.tensor(0), call.attribute("axis", 0)
        keep = bool(call.attribute("keepdims", 1))
        if not call.attribute("select_last_index", 0):
            return function(x, axis, keepdim=keep)
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)

    return run


def top_k(call: Call) -> tuple[Tensor, Tensor]:
    x = call.tensor(0)
    k = call.attribute("k") if call.node.version < 10 else call.number(1)
    axis = call.attribute("axis", -1)
    largest, _ = bool(call.attribute("largest", 1)), call.attribute("sorted", 1)
    # In order whether asked for or not; of equal numbers the first, which torch.topk leaves open.
    found = torch.sort(x, dim=axis, descending=largest, stable=True)
    return found.values.narrow(axis, 0, k), found.indices.narrow(axis, 0, k)


def running(function: Callable[..., Tensor], start: float) -> Callable[[Call], Tensor]:
    """Sums or products of all numbers so far."""

    def run(call: Call) -> Tensor:
        x, axis = call.tensor(0), call.number(1)
        backwards = call.attribute("reverse", 0)
        x = x.flip(axis) if backwards else x
        made = function(x, axis, dtype=x.dtype)
        if call.attribute("exclusive", 0):
            first = torch.full_like(x.narrow(axis, 0, 1), start)
            made = torch.cat((first, made.narrow(axis, 0, x.shape[axis] - 1)), axis)
        return made.flip(axis) if backwards else made

    return run


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"ReduceSum": reduce(_sum, 13), "ReduceMean": reduce(_mean), "ReduceMax": reduce(_max)},
    **{"ReduceMin": reduce(_min), "ReduceProd": reduce(_product), "ReduceL1": reduce(_l1)},
    **{"ReduceL2": reduce(_l2), "ReduceLogSum": reduce(_log_sum)},
    **{"ReduceLogSumExp": reduce(_log_sum_exp), "ReduceSumSquare": reduce(_squares)},
    **{"ArgMax": extreme(torch.argmax), "ArgMin": extreme(torch.argmin), "TopK": top_k},
    **{"CumSum": running(torch.cumsum, 0), "CumProd": running(torch.cumprod, 1)},
}
