"""Normalisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import Call


def batch_norm(call: Call) -> Any:
    """Its statistics move in training, as PyTorch's do; ONNX's momentum is what stays."""
    x, scale, bias, mean, var = (call.tensor(place) for place in range(5))
    if call.attribute("training_mode", 0) or len([n for n in call.node.outputs if n]) > 1:
        raise call.node.refused("is fixed in training mode")
    if call.node.version < 9 and not call.attribute("spatial", 1):
        raise call.node.refused("has statistics of each place (spatial=0)")
    momentum = 1.0 - call.attribute("momentum", 0.9)
    eps = call.attribute("epsilon", 1e-5)
    return F.batch_norm(x, mean, var, scale, bias, call.training, momentum, eps)


def instance_norm(call: Call) -> Tensor:
    x, scale, bias = (call.tensor(place) for place in range(3))
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.attribute("epsilon", 1e-5))


def layer_norm(call: Call) -> Any:
    x, scale, bias = call.tensor(0), call.maybe(1), call.maybe(2)
    axis = call.attribute("axis", -1) % x.dim()
    eps = call.attribute("epsilon", 1e-5)
    if any(call.node.outputs[1:]):
        return _with_moments(x, scale, bias, axis, eps)
    shape = x.shape[axis:]
    wide = scale is not None and tuple(scale.shape) != tuple(shape)
    if wide or (bias is not None and tuple(bias.shape) != tuple(shape)):
        made = F.layer_norm(x, shape, eps=eps)
        made = made if scale is None else made * scale
        return made if bias is None else made + bias
    return F.layer_norm(x, shape, scale, bias, eps)


def _with_moments(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the means, and one over the deviations."""
    axes = tuple(range(axis, x.dim()))
    mean = x.mean(axes, keepdim=True)
    inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + eps)
    made = (x - mean) * inverse
    made = made if scale is None else made * scale
    return made if bias is None else made + bias, mean, inverse


def skip_layer_norm(call: Call) -> Any:
    """ONNX Runtime's: a sum and its norm; the sum is its fourth output."""
    x, skip, scale, bias = call.tensor(0), call.tensor(1), call.tensor(2), call.maybe(3)
    total = x + skip
    total = total + call.tensor(4) if call.has(4) else total
    eps = call.attribute("epsilon", 1e-12)
    made = F.layer_norm(total, total.shape[-1:], scale, bias, eps)
    return made, None, None, total


def skip_rms_norm(call: Call) -> Any:
    x, skip, scale = call.tensor(0), call.tensor(1), call.tensor(2)
    total = x + skip
    total = total + call.tensor(3) if call.has(3) else total
    made = F.rms_norm(total, total.shape[-1:], scale, call.attribute("epsilon", 1e-12))
    return made, None, None, total


def rms_norm(call: Call) -> Tensor:
    x, scale = call.tensor(0), call.maybe(1)
    axis = call.attribute("axis", -1) % x.dim()
    eps = call.attribute("epsilon", 1e-5)
    if scale is not None and tuple(scale.shape) != tuple(x.shape[axis:]):
        return F.rms_norm(x, x.shape[axis:], eps=eps) * scale
    return F.rms_norm(x, x.shape[axis:], scale, eps)


def group_norm(call: Call) -> Tensor:
    """Before opset 21 scale and bias were those of groups."""
    x, scale, bias = call.tensor(0), call.maybe(1), call.maybe(2)
    groups, eps = call.attribute("num_groups"), call.attribute("epsilon", 1e-5)
    own = call.node.op.startswith("paredown")
    shape = call.attribute("shape")
    if shape is not None and len(shape) != x.dim():
        raise call.node.refused(f"has a shape of {len(shape)} axes after it, and {x.dim()} before")
    if call.node.version < 21 and not own and scale is not None and bias is not None:
        each = x.shape[1] // groups
        scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, groups, scale, bias, eps)


def lp_norm(call: Call) -> Tensor:
    x, axis, p = call.tensor(0), call.attribute("axis", -1), call.attribute("p", 2)
    length = (
        x.abs().sum(axis, keepdim=True) if p == 1 else x.square().sum(axis, keepdim=True).sqrt()
    )
    return torch.where(length == 0, torch.zeros_like(x), x / length)


def lrn(call: Call) -> Tensor:
    """Over neighbouring channels; with an even size there is one more after than before."""
    x, size = call.tensor(0), call.attribute("size")
    alpha, beta, bias = (
        call.attribute(n, d) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    before, after = math.floor((size - 1) / 2), math.ceil((size - 1) / 2)
    flat = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    sums = F.avg_pool2d(F.pad(flat, (0, 0, before, after)), (size, 1), 1)
    return x / (bias + alpha * sums.reshape(x.shape)).pow(beta)


def mean_variance_norm(call: Call) -> Tensor:
    x, axes = call.tensor(0), tuple(call.attribute("axes", [0, 2, 3]))
    mean = x.mean(axes, keepdim=True)
    spread = ((x * x).mean(axes, keepdim=True) - mean * mean).sqrt()
    return (x - mean) / (spread + 1e-9)


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"BatchNormalization": batch_norm, "InstanceNormalization": instance_norm},
    **{"LayerNormalization": layer_norm, "com.microsoft.LayerNormalization": layer_norm},
    **{"RMSNormalization": rms_norm, "SimplifiedLayerNormalization": rms_norm},
    "com.microsoft.SimplifiedLayerNormalization": rms_norm,
    "com.microsoft.SkipLayerNormalization": skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": skip_rms_norm,
    **{"GroupNormalization": group_norm, "paredown.GroupNorm": group_norm},
    **{"LpNormalization": lp_norm, "LRN": lrn, "MeanVarianceNormalization": mean_variance_norm},
}
