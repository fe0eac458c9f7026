"""Layers of numbers, of norms and of shapes, each told again in torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paredown.graph.doors.keras.convolutions import lora
from paredown.graph.doors.keras.value import (
    Function,
    Layer,
    Value,
    each,
    first,
    last,
    parameter,
    same,
    set_to,
    whole,
)

NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
# What is not there in evaluation, and in training draws at random.
NOTHING = (
    "ActivityRegularization",
    "GaussianNoise",
    "GaussianDropout",
    "AlphaDropout",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomFlip",
    "RandomHeight",
    "RandomRotation",
    "RandomTranslation",
    "RandomWidth",
    "RandomZoom",
)


def looked_up(module: nn.Module, value: Value) -> Value:
    """Through an embedding, whose numbers Keras may have as floats."""
    return Value(module(value.tensor.to(torch.int64)))


def dense(layer: Any) -> Layer | None:
    if getattr(layer, "quantization_mode", None) or lora(layer):
        return None
    made = nn.Linear(layer.kernel.shape[0], layer.kernel.shape[1], bias=layer.use_bias)
    set_to(made.weight, parameter(layer.kernel).T)  # Keras's is (in, out)
    if layer.use_bias:
        set_to(made.bias, parameter(layer.bias))
    return last(made)


def distributed(layer: Any) -> Layer | None:
    """A dense layer at each time, which it is by itself."""
    inner = layer.layer
    if type(inner).__name__ != "Dense" or inner.activation.__name__ != "linear":
        return None
    return dense(inner)


def embedding(layer: Any) -> Layer | None:
    if getattr(layer, "quantization_mode", None) or lora(layer):
        return None
    made = nn.Embedding.from_pretrained(parameter(layer.embeddings), freeze=False)
    return Layer(made, looked_up)


def batch_norm(layer: Any) -> Layer | None:
    rank = len(layer.input.shape)
    if layer.axis not in (-1, rank - 1) or rank not in NORMS:
        return None
    made = NORMS[rank](layer.moving_mean.shape[0], layer.epsilon, 1 - layer.momentum)
    set_to(made.running_mean, parameter(layer.moving_mean))
    set_to(made.running_var, parameter(layer.moving_variance))
    if layer.scale:
        set_to(made.weight, parameter(layer.gamma))
    if layer.center:
        set_to(made.bias, parameter(layer.beta))
    return first(made)


def layer_norm(layer: Any) -> Layer | None:
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)
    if axes not in ([-1], [len(layer.input.shape) - 1]) or getattr(layer, "rms_scaling", False):
        return None
    made = nn.LayerNorm(layer.input.shape[-1], layer.epsilon)
    if layer.scale:
        set_to(made.weight, parameter(layer.gamma))
    if layer.center:
        set_to(made.bias, parameter(layer.beta))
    return last(made)


def group_norm(layer: Any) -> Layer | None:
    if layer.axis not in (-1, len(layer.input.shape) - 1) or layer.groups < 1:
        return None
    made = nn.GroupNorm(layer.groups, layer.input.shape[-1], layer.epsilon)
    if layer.scale:
        set_to(made.weight, parameter(layer.gamma))
    if layer.center:
        set_to(made.bias, parameter(layer.beta))
    return first(made)


class Normalized(nn.Module):
    """Less a mean and over a deviation that are no parameters."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) - self.get_buffer("mean")) / self.get_buffer("deviation")


def normalization(layer: Any) -> Layer | None:
    if layer.invert or layer.mean is None:
        return None
    mean, variance = (_numbers(one) for one in (layer.mean, layer.variance))
    return last(Normalized(mean, variance.sqrt().clamp(min=1e-7)))


def _numbers(value: Any) -> Tensor:
    """A tensor or an array as it is, in memory of its own."""
    return torch.as_tensor(value).detach().cpu().to(torch.float32).clone()


def dropout(layer: Any) -> Layer:
    return each(nn.Dropout(layer.rate))


def channel_dropout(layer: Any) -> Layer:
    rank = len(layer.input.shape)
    return first({3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[rank](layer.rate))


def nothing(layer: Any) -> Layer:
    return each(nn.Identity())


def flatten(layer: Any) -> Layer | None:
    return last(nn.Flatten()) if layer.data_format == "channels_last" else None


def reshape(layer: Any) -> Layer:
    sizes = tuple(layer.target_shape)
    if len(layer.input.shape) == 2 and all(size == 1 for size in sizes[:-1]) and sizes[1:]:
        spatial = (1,) * (len(sizes) - 1)  # one pixel of all channels, whichever of them are first
        return Layer(nn.Unflatten(1, (-1, *spatial)), _one_pixel)
    return last(lambda x: x.reshape(x.shape[0], *sizes))


def _one_pixel(module: nn.Module, value: Value) -> Value:
    return Value(module(value.tensor), True)


def permute(layer: Any) -> Layer:
    order = (0, *layer.dims)
    return last(lambda x: x.permute(order))


def repeat(layer: Any) -> Layer:
    count = int(layer.n)
    return last(lambda x: x.unsqueeze(1).expand(-1, count, -1))


def cropping(layer: Any) -> Layer | None:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    pairs = layer.cropping
    pairs = pairs if isinstance(pairs[0], (tuple, list)) else [pairs]

    def cut(x: Tensor) -> Tensor:
        for dim, (begin, end) in enumerate(pairs, 2):
            x = x.narrow(dim, begin, x.shape[dim] - begin - end)
        return x

    return first(Function(cut))


class Merged(nn.Module):
    """Several values as one, number by number."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], is_mean: bool = False) -> None:
        super().__init__()
        self.function, self.is_mean = function, is_mean

    def forward(self, values: list[Value]) -> Value:
        aligned = same(values)
        made = aligned[0].tensor
        for value in aligned[1:]:
            made = self.function(made, value.tensor)
        return Value(made / len(values) if self.is_mean else made, aligned[0].is_first)


class Joined(nn.Module):
    """Several values behind each other along one of Keras's axes."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, values: list[Value]) -> Value:
        aligned = same(values)
        rank = aligned[0].tensor.dim()
        axis = self.axis % rank
        if aligned[0].is_first:
            axis = 1 if axis == rank - 1 else axis + 1 if axis else 0
        return Value(torch.cat([one.tensor for one in aligned], axis), aligned[0].is_first)


TABLE: dict[str, Callable[[Any], Layer | None]] = {
    "Dense": dense,
    "TimeDistributed": distributed,
    "Embedding": embedding,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "GroupNormalization": group_norm,
    "Normalization": normalization,
    "Dropout": dropout,
    "SpatialDropout1D": channel_dropout,
    "SpatialDropout2D": channel_dropout,
    "SpatialDropout3D": channel_dropout,
    "Identity": nothing,
    **dict.fromkeys(NOTHING, nothing),
    "Flatten": flatten,
    "Reshape": reshape,
    "Permute": permute,
    "RepeatVector": repeat,
    "Cropping1D": cropping,
    "Cropping2D": cropping,
    "Cropping3D": cropping,
    "Add": lambda layer: whole(Merged(torch.add)),
    "Subtract": lambda layer: whole(Merged(torch.sub)),
    "Multiply": lambda layer: whole(Merged(torch.mul)),
    "Maximum": lambda layer: whole(Merged(torch.maximum)),
    "Minimum": lambda layer: whole(Merged(torch.minimum)),
    "Average": lambda layer: whole(Merged(torch.add, is_mean=True)),
    "Concatenate": lambda layer: whole(Joined(layer.axis)),
}
