"""Weights of one and two bits: signs, or signs and zeros, with a scale for each output channel.

Both are functions of the float weight alone, so that scales follow it through training, and
through a batch norm that is folded into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.graph.quantized.rounding import spread

THRESHOLD = 0.7  # of a channel's mean magnitude (1605.04711, equation 6)


# --- mathematics -----------------------------------------------------------------------------


def binary_scales(weight: Tensor, axis: int) -> Tensor:
    """The mean magnitude of each output channel: the scale with the least squared error (XNOR-Net,
    arXiv 1603.05279, equation 6).

    Shapes: weight (..., C, ...) with C at ``axis`` -> (C,).

    Example:
        >>> binary_scales(torch.tensor([[1.0, -3.0], [0.5, 0.5]]), 0)
        tensor([2.0000, 0.5000])
    """
    return weight.abs().mean(_others(weight, axis))


def signs(weight: Tensor) -> Tensor:
    """1 where the weight is 0 or above, else -1; there is no zero in one bit.

    Example:
        >>> signs(torch.tensor([0.3, 0.0, -0.2]))
        tensor([ 1.,  1., -1.])
    """
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


def ternary_signs(weight: Tensor, axis: int) -> Tensor:
    """-1, 0 or 1: zero up to 0.7 times the channel's mean magnitude, which is about where the
    squared error is least (ternary weight networks, arXiv 1605.04711).

    Shapes: weight (...) -> (...).

    Example:
        >>> ternary_signs(torch.tensor([[2.0, -3.0, 0.5, 0.0]]), 0)
        tensor([[ 1., -1.,  0.,  0.]])
    """
    threshold = THRESHOLD * binary_scales(weight, axis)
    return weight.sign() * (weight.abs() > spread(threshold, weight, axis))


def ternary_scales(weight: Tensor, axis: int) -> Tensor:
    """The mean magnitude of the weights that `ternary_signs` keeps (arXiv 1605.04711).

    Shapes: weight (..., C, ...) with C at ``axis`` -> (C,); 0 for a channel of zeros.

    Example:
        >>> ternary_scales(torch.tensor([[2.0, -3.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]), 0)
        tensor([2.5000, 0.0000])
    """
    kept = ternary_signs(weight, axis).abs()
    dims = _others(weight, axis)
    return (weight.abs() * kept).sum(dims) / kept.sum(dims).clamp(min=1)


def raised(weight: Tensor, axis: int, scales: Tensor, least: Tensor) -> Tensor:
    """A weight of the same signs whose scales (C,), now ``scales``, are at least ``least``.

    A channel of zeros, which has the signs of one bit nevertheless, gets that value everywhere.

    Example:
        >>> weight, least = torch.tensor([[1.0, -3.0], [0.0, 0.0]]), torch.tensor([4.0, 0.5])
        >>> raised(weight, 0, binary_scales(weight, 0), least)
        tensor([[ 2.0000, -6.0000],
                [ 0.5000,  0.5000]])
    """
    factors = torch.where(scales > 0, least / scales, 1.0).clamp(min=1)
    filled = torch.where(scales > 0, 0.0, least)
    return weight * spread(factors, weight, axis) + spread(filled, weight, axis)


def _others(weight: Tensor, axis: int) -> list[int]:
    return [dim for dim in range(weight.dim()) if dim != axis]


# --- the ops ---------------------------------------------------------------------------------


@torch.library.custom_op("paredown::fake_quantize_binary", mutates_args=())
def fake_quantize_binary(weight: Tensor, axis: int) -> Tensor:
    """The weight's signs times the scale of their channel (1603.05279); shape kept.

    Example:
        >>> fake_quantize_binary(torch.tensor([[1.0, -3.0], [0.5, 0.5]]), 0)
        tensor([[ 2.0000, -2.0000],
                [ 0.5000,  0.5000]])
    """
    return signs(weight) * spread(binary_scales(weight, axis), weight, axis)


@torch.library.custom_op("paredown::fake_quantize_ternary", mutates_args=())
def fake_quantize_ternary(weight: Tensor, axis: int) -> Tensor:
    """Signs and zeros times the scale of their channel (1605.04711); shape kept.

    Example:
        >>> fake_quantize_ternary(torch.tensor([[2.0, -3.0, 0.5, 0.0]]), 0)
        tensor([[ 2.5000, -2.5000,  0.0000,  0.0000]])
    """
    return ternary_signs(weight, axis) * spread(ternary_scales(weight, axis), weight, axis)


BINARY = torch.ops.paredown.fake_quantize_binary.default
TERNARY = torch.ops.paredown.fake_quantize_ternary.default


@fake_quantize_binary.register_fake
@fake_quantize_ternary.register_fake
def _(weight: Tensor, axis: int) -> Tensor:
    return torch.empty_like(weight)


# --- what trains -----------------------------------------------------------------------------


def binary_gradient(weight: Tensor, axis: int, grad: Tensor) -> Tensor:
    """From the gradient of the binary weight to that of the float one (1603.05279, section 3.1).

    ``grad * scale`` straight through the sign, plus what moves the scale, ``sign / n`` times the
    channel's sum of ``grad * sign``; n weights share a scale.

    Shapes: weight and grad (...) -> (...).
    """
    dims = _others(weight, axis)
    count = weight.numel() // weight.shape[axis]
    toward = (grad * signs(weight)).sum(dims, keepdim=True) / count
    return grad * spread(binary_scales(weight, axis), weight, axis) + signs(weight) * toward


def _keep_weight(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, ctx.axis = inputs
    ctx.save_for_backward(weight)


def _through_binary(ctx, grad):  # type: ignore[no-untyped-def]
    (weight,) = ctx.saved_tensors
    return binary_gradient(weight, ctx.axis, grad), None


def _through_ternary(ctx, grad):  # type: ignore[no-untyped-def]
    return grad, None


fake_quantize_binary.register_autograd(_through_binary, setup_context=_keep_weight)
fake_quantize_ternary.register_autograd(_through_ternary, setup_context=_keep_weight)
