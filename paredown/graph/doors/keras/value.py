"""Values between the layers, and in which order their dimensions lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Value:
    """A tensor as Keras has it, channels last, or as torch's layers want it, channels first.

    Which of the two follows the layers: the dimensions are swapped where it changes alone.

    Example:
        >>> value = Value(torch.zeros(1, 8, 9, 3))
        >>> value.first().tensor.shape, value.first().last().tensor.shape
        (torch.Size([1, 3, 8, 9]), torch.Size([1, 8, 9, 3]))
    """

    tensor: Tensor
    is_first: bool = False

    def first(self) -> Value:
        if self.is_first or self.tensor.dim() < 3:
            return self
        return Value(self.tensor.movedim(-1, 1), True)

    def last(self) -> Value:
        return Value(self.tensor.movedim(1, -1)) if self.is_first else self


@dataclass(frozen=True)
class Layer:
    """A layer of torch's, which keeps its own names of parameters, and how values go through it.

    Attributes:
        call: ``call(module, *values)`` -> a value, or a list of them.
    """

    module: nn.Module
    call: Callable[..., Any]

    def then(self, after: Layer) -> Layer:
        """This one, and behind it one without parameters."""
        return Layer(self.module, Behind(self.call, after))


@dataclass(frozen=True)
class Behind:
    """What a call gives goes through one more."""

    call: Callable[..., Any]
    after: Layer

    def __call__(self, module: nn.Module, *values: Value) -> Any:
        return self.after.call(self.after.module, self.call(module, *values))


def first(module: nn.Module, pads: Sequence[int] = ()) -> Layer:
    """A layer that works with the channels first, behind padding as ``F.pad`` takes it."""

    def call(module: nn.Module, value: Value) -> Value:
        value = value.first()
        x = functional.pad(value.tensor, tuple(pads)) if pads else value.tensor
        return Value(module(x), value.is_first)

    return Layer(module, call)


def last(module: nn.Module | Callable[[Tensor], Tensor]) -> Layer:
    """A layer that works with the channels last, as Keras has them."""
    return Layer(_as_module(module), lambda module, value: Value(module(value.last().tensor)))


def each(module: nn.Module | Callable[[Tensor], Tensor]) -> Layer:
    """A layer that works on each number by itself, in whatever order they lie."""
    return Layer(
        _as_module(module), lambda module, value: Value(module(value.tensor), value.is_first)
    )


def whole(module: nn.Module) -> Layer:
    """A layer that takes values as they are, and gives values."""
    return Layer(module, lambda module, *values: module(*values))


class Function(nn.Module):
    """A function as a layer without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def _as_module(given: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
    return given if isinstance(given, nn.Module) else Function(given)


def same(values: Sequence[Value]) -> list[Value]:
    """The values in one order: with the channels first where one has them so and all can."""
    ranks = {value.tensor.dim() for value in values}
    if any(value.is_first for value in values) and len(ranks) == 1:
        return [value.first() for value in values]
    return [value.last() for value in values]


def parameter(weight: Any) -> Tensor:
    """A copy of a Keras weight, in memory of its own."""
    made: Tensor = weight.value.detach().cpu().to(torch.float32).clone()
    return made


def set_to(target: Tensor | None, values: Tensor) -> None:
    """Give a parameter or a buffer of torch's its numbers."""
    assert target is not None and target.shape == values.shape
    with torch.no_grad():
        target.copy_(values)
