"""Fake quantizers as they train: rounding to a grid whose scale learns, follows, or stays.

Plain functions that stand in a graph while it trains, in the place of the fake quantizers of
`paredown.graph.quantized.quantizers`, which compute the same numbers, bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown.graph.quantized.scales import LEVELS, SMALLEST_SCALE

MOMENTUM = 0.01  # share of a batch's range in the moving average


def on_grid(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, low: int, high: int
) -> Tensor:
    """``scale * (clamp(round(x / scale) + zero_point, low, high) - zero_point)``; shape kept.

    Example:
        >>> on_grid(torch.tensor([0.04, 0.26, 9.0]), 0.1, 0, 0, 10)
        tensor([0.0000, 0.3000, 1.0000])
    """
    return levels(x, scale, zero_point, low, high).mul_(scale)


def levels(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, low: int, high: int
) -> Tensor:
    """`on_grid` as whole numbers of scales; shape kept.

    Example:
        >>> levels(torch.tensor([0.04, 0.26, 9.0]), 0.1, 0, 0, 10)
        tensor([ 0.,  3., 10.])
    """
    bottom, top = low - zero_point, high - zero_point
    return _steps(x, scale).clamp_(bottom, top)  # type: ignore[arg-type]


def round_to_grid(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """`on_grid`, and where nothing was clamped; both of x's shape.

    Example:
        >>> values, inside = round_to_grid(torch.tensor([0.04, 0.26, 9.0]), 0.1, 0, 0, 10)
        >>> values, inside
        (tensor([0.0000, 0.3000, 1.0000]), tensor([ True,  True, False]))
    """
    steps = _steps(x, scale)
    made = steps.clamp(low - zero_point, high - zero_point)  # type: ignore[arg-type]
    inside = steps == made
    return made.mul_(scale), inside


def _steps(x: Tensor, scale: Tensor | float) -> Tensor:
    """``round(x / scale)``, a tensor of its own."""
    one = np.float32(1)
    inverse = scale.reciprocal() if isinstance(scale, Tensor) else float(one / np.float32(scale))
    return (x * inverse).round_()


def affine_of(x: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The scale () and zero point () with which ``low..high`` span a tensor's values and 0.

    Example:
        >>> affine_of(torch.tensor([-1.0, 0.5, 4.1]), 0, 255)
        (tensor(0.0200), tensor(50.))
    """
    bottom, top = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((top - bottom) / (high - low)).clamp(min=SMALLEST_SCALE)
    return scale, (low - bottom / scale).round().clamp(low, high)


def spread(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale (C,) for dimension ``axis`` of x, in a shape that goes with x's."""
    return scale.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])


def step_gradient(
    grad: Tensor, x: Tensor, made: Tensor, inside: Tensor, scale: Tensor, axis: int | None
) -> Tensor:
    """Gradient of a loss in the scale: ``round(x / s) - x / s`` inside the grid, the grid's end
    outside, times the gradient in each value (LSQ, Esser et al. 1902.08153, equation 3).

    Shapes: grad, x, made, inside (...), scale () or, with an axis, (C,) -> that of scale.

    Example:
        >>> x, scale = torch.tensor([0.04, 0.26, 9.0]), torch.tensor(0.1)
        >>> step_gradient(torch.ones(3), x, *round_to_grid(x, scale, 0, 0, 10), scale, None)
        tensor(10.)
    """
    passed = grad * inside
    if axis is None:
        total = torch.dot(grad.flatten(), made.flatten()) - torch.dot(passed.flatten(), x.flatten())
    else:
        total = (grad * made - passed * x).movedim(axis, 0).flatten(1).sum(1)
    return total / scale


def gradient_scale(count: int, high: int) -> float:
    """What LSQ multiplies a scale's gradient by, so that scales and weights move at one pace:
    ``1 / sqrt(count * high)`` for ``count`` values up to ``high`` (1902.08153, section 2.2).

    Example:
        >>> gradient_scale(100, 4)
        0.05
    """
    return 1 / math.sqrt(max(1, count * high))


class _Rounding(torch.autograd.Function):
    """Rounds with the scale ``scale * exp(change)``; straight through to x, as LSQ to the change.

    The change is that of the scale's logarithm, in which Adam's steps are shares of the scale
    (Jain et al. 1903.08066). Its gradient is LSQ's over the scale, so that a plain gradient step
    moves the scale, to first order, by what LSQ moves it; held to 1, so that no step moves a scale
    by more than the learning rate's share of it. A channel of almost no weights would else have a
    gradient of any size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        change: Tensor | None,
        zero_point: Tensor | int,
        low: int,
        high: int,
        axis: int | None,
    ) -> Tensor:
        used = scale if change is None else scale * change.exp()
        each = used if axis is None else spread(used, x, axis)
        made, inside = round_to_grid(x, each, zero_point, low, high)
        ctx.axis, ctx.high = axis, high
        if change is None:
            ctx.save_for_backward(inside)
        else:
            ctx.save_for_backward(inside, x, made, used)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        inside, *rest = ctx.saved_tensors
        change = None
        if rest:
            x, made, scale = rest
            found = step_gradient(grad, x, made, inside, scale, ctx.axis)
            count = x.numel() // x.shape[0 if ctx.axis is None else ctx.axis]
            change = (found * gradient_scale(count, ctx.high) / scale).clamp_(-1, 1)
        return grad * inside, None, change, None, None, None, None


def fake_quantize_training(
    x: Tensor, scale: Tensor, change: Tensor | None, zero_point: int, low: int, high: int
) -> Tensor:
    """Round x (...) with the scale () times the exponential of the ``change`` (), which learns;
    without a change the scale stays.

    Example:
        >>> x, change = torch.tensor([[0.04, 0.26, 9.0]]), torch.zeros((), requires_grad=True)
        >>> made = fake_quantize_training(x, torch.tensor(0.1), change, 0, 0, 10)
        >>> (made / 100).sum().backward()
        >>> round(float(change.grad), 3)  # 0.1 / 0.1 over the root of 3 values times 10 levels
        0.183
    """
    made: Tensor = _Rounding.apply(x, scale, change, zero_point, low, high, None)  # type: ignore[no-untyped-call]
    return made


def fake_quantize_channel_training(
    weight: Tensor, scale: Tensor, change: Tensor | None, axis: int, low: int, high: int
) -> Tensor:
    """The same for a weight: a scale and a change (C,) for each index of dimension ``axis``."""
    made: Tensor = _Rounding.apply(weight, scale, change, 0, low, high, axis)  # type: ignore[no-untyped-call]
    return made


def fake_quantize_average(x: Tensor, span: Tensor, low: int, high: int) -> Tensor:
    """Round x (...) to the grid of ``span`` (2,), the moving average of each batch's least and
    largest value; it moves while gradients are on (Jacob et al. 1712.05877, section 3.1)."""
    if torch.is_grad_enabled():
        with torch.no_grad():
            span.lerp_(torch.stack(torch.aminmax(x.detach())), MOMENTUM)
    scale, zero_point = grid_of(span)
    return fake_quantize_training(x, scale, None, zero_point, low, high)  # type: ignore[arg-type]


def grid_of(span: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point () that map the span (2,), widened to hold 0, onto 0..255.

    Example:
        >>> grid_of(torch.tensor([-0.5, 0.75]))
        (tensor(0.0049), tensor(102.))
    """
    low, high = span[0].clamp(max=0), span[1].clamp(min=0)
    scale = ((high - low) / LEVELS).clamp(min=SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(0, LEVELS)


def fake_quantize_following(
    weight: Tensor, scale: Tensor, largest: Tensor, axis: int, low: int, high: int
) -> Tensor:
    """Round a weight with scales (C,) that follow each channel's largest value (1712.05877)."""
    followed = following_scales(weight, scale, largest, axis)
    return fake_quantize_channel_training(weight, followed, None, axis, low, high)


def following_scales(weight: Tensor, scale: Tensor, largest: Tensor, axis: int) -> Tensor:
    """The scales (C,) that went with each channel's ``largest`` value (C,), for its value now.

    Example:
        >>> weight, largest = torch.tensor([[2.0, -4.0]]), torch.tensor([2.0])
        >>> following_scales(weight, torch.tensor([0.1]), largest, 0)
        tensor([0.2000])
    """
    now = largest_of(weight, axis)
    grown = torch.where(largest > 0, now / largest, 1)
    return (scale * grown).clamp(min=SMALLEST_SCALE)


def largest_of(weight: Tensor, axis: int) -> Tensor:
    """The largest absolute value (C,) of each index of dimension ``axis``."""
    return weight.detach().abs().amax([dim for dim in range(weight.dim()) if dim != axis])


def fake_quantize_moved(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """x as it is: values that were only moved lie on the grid of their source already, and what
    dropout has enlarged for training must not be clipped to it."""
    return x
