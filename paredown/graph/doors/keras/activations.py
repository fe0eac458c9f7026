"""Activations by the names that Keras gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.graph.doors.keras.value import Layer, Value, each, whole

FUNCTIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_silu": nn.Hardswish,
    "mish": nn.Mish,
}


class Softmax(nn.Module):
    """Over the channels, or over another axis of Keras's."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, value: Value) -> Value:
        if self.axis == -1:
            return Value(F.softmax(value.tensor, 1 if value.is_first else -1), value.is_first)
        return Value(F.softmax(value.last().tensor, self.axis))


def function(chosen: Any) -> Layer | None:
    """What an ``activation`` is in torch, as a layer of values; None where it is not here."""
    name = getattr(chosen, "__name__", "")
    if name == "softmax":
        return whole(Softmax())
    return each(FUNCTIONS[name]()) if name in FUNCTIONS else None


def activation(layer: Any) -> Layer | None:
    return function(layer.activation)


def relu(layer: Any) -> Layer | None:
    if layer.threshold:
        return None
    if layer.max_value is None:
        slope = float(layer.negative_slope)
        return each(nn.LeakyReLU(slope) if slope else nn.ReLU())
    if layer.negative_slope:
        return None
    return each(nn.ReLU6() if layer.max_value == 6 else nn.Hardtanh(0.0, float(layer.max_value)))


def leaky_relu(layer: Any) -> Layer:
    return each(nn.LeakyReLU(float(layer.negative_slope)))


def elu(layer: Any) -> Layer:
    return each(nn.ELU(float(layer.alpha)))


def softmax(layer: Any) -> Layer | None:
    return whole(Softmax(layer.axis)) if isinstance(layer.axis, int) else None


def rescaling(layer: Any) -> Layer | None:
    numbers = (layer.scale, layer.offset)
    if not all(isinstance(each, (int, float)) for each in numbers):
        return None
    scale, offset = (float(each) for each in numbers)

    def scaled(x: Tensor) -> Tensor:
        return x.to(torch.float32) * scale + offset

    return each(scaled)


TABLE: dict[str, Callable[[Any], Layer | None]] = {
    "Activation": activation,
    "ReLU": relu,
    "LeakyReLU": leaky_relu,
    "ELU": elu,
    "Softmax": softmax,
    "Rescaling": rescaling,
}
