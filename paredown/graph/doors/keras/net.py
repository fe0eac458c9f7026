"""A Keras model as a module of torch's own layers, one after the other as Keras calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.graph.doors.keras import activations, attention, convolutions, layers, recurrent
from paredown.graph.doors.keras.value import Layer, Value, same, whole

TABLE: dict[str, Callable[[Any], Layer | None]] = {
    **activations.TABLE,
    **attention.TABLE,
    **convolutions.TABLE,
    **layers.TABLE,
    **recurrent.TABLE,
}
WITHIN = ("Activation", "ReLU", "Softmax")  # whose activation is all that they are
MASKS = ("Masking",)
OPS: dict[str, Callable[..., Tensor]] = {  # of keras.ops, on values and numbers
    "Add": torch.add,
    "Subtract": torch.sub,
    "Multiply": torch.mul,
    "Divide": torch.true_divide,
    "TrueDivide": torch.true_divide,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class Place:
    """Stands for a value in the arguments of a call."""

    number: int


@dataclass(frozen=True)
class Step:
    """One call of a layer: its name here, its arguments, and the values that it gives."""

    name: str
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    gives: tuple[int, ...]


class Net(nn.Module):
    """Calls of layers, from inputs by name to one output or several by name."""

    def __init__(
        self, parts: dict[str, nn.Module], steps: list[Step], inputs: dict[str, int], outputs: Any
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.steps, self.inputs, self.outputs = tuple(steps), inputs, outputs

    def forward(self, **inputs: Tensor) -> Any:
        found = self.run({place: Value(inputs[name]) for name, place in self.inputs.items()})
        made = {name: found[place].last().tensor for name, place in self.outputs.items()}
        return made if len(made) > 1 else next(iter(made.values()))

    def run(self, values: dict[int, Value]) -> dict[int, Value]:
        """All values by their numbers, from those of the inputs."""
        values = dict(values)
        for step in self.steps:
            layer = self.get_submodule(step.name)
            found = step.call(layer, *_filled(step.args, values), **_filled(step.kwargs, values))
            many = found if isinstance(found, list) else [found]
            values |= dict(zip(step.gives, many, strict=True))
        return values


class Inner(nn.Module):
    """A model that is a layer of another: values in, values out."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, *values: Any) -> Any:
        given = values[0] if len(values) == 1 and isinstance(values[0], list) else list(values)
        found = self.net.run(dict(zip(self.net.inputs.values(), given, strict=True)))
        made = [found[place] for place in self.net.outputs.values()]
        return made if len(made) > 1 else made[0]


class Operation(nn.Module):
    """An op of Keras's, which has no parameters."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("training")
        return self.op(*args, **kwargs)


def own(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Through a layer or an op of Keras's, by Keras's own code on the channels last."""
    found = layer(*plain(args), **plain(kwargs), training=layer.training)
    many = isinstance(found, (list, tuple))
    return [Value(each) for each in found] if many else Value(found)


def plain(value: Any) -> Any:
    """Nested arguments with the tensors of values, channels last."""
    if isinstance(value, Value):
        return value.last().tensor
    if isinstance(value, (list, tuple)):
        return type(value)(plain(each) for each in value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def _filled(value: Any, values: dict[int, Value]) -> Any:
    if isinstance(value, Place):
        return values[value.number]
    if isinstance(value, (list, tuple)):
        return type(value)(_filled(each, values) for each in value)
    if isinstance(value, dict):
        return {name: _filled(each, values) for name, each in value.items()}
    return value


def masked(model: Any) -> bool:
    """Whether a mask goes through the model beside its values, which Keras alone follows."""
    every = list(model._flatten_layers(include_self=False, recursive=True))
    return any(type(each).__name__ in MASKS or getattr(each, "mask_zero", False) for each in every)


def told(model: Any, names: list[str], outputs: list[str]) -> tuple[Net, list[str]]:
    """The model in torch's layers, and the layers that stay Keras's own.

    Args:
        names: what its inputs are called, in their order.
        outputs: what its outputs are called.
    """
    functional = _functional(model)
    numbers: dict[int, int] = {id(each): n for n, each in enumerate(functional.inputs)}
    parts: dict[str, nn.Module] = {}
    known: dict[int, tuple[str, Layer]] = {}  # a layer that is called twice is one module
    steps: list[Step] = []
    kept: list[str] = []
    for node in _nodes(functional):
        layer = node.operation
        args, kwargs = (
            _places(each, numbers) for each in (node.arguments.args, node.arguments.kwargs)
        )
        kwargs = {name: each for name, each in kwargs.items() if each is not None}
        kwargs.pop("training", None)
        if id(layer) not in known:
            made, inside = _layer(layer, kwargs)
            known[id(layer)] = _free(str(layer.name), parts), made
            parts[known[id(layer)][0]] = made.module
            kept += inside
        name, made = known[id(layer)]
        gives = []
        for tensor in node.outputs:
            numbers[id(tensor)] = len(numbers)
            gives.append(numbers[id(tensor)])
        kwargs = kwargs if made.call is own else {}
        steps.append(Step(name, made.call, args, kwargs, tuple(gives)))
    given = {name: number for number, name in enumerate(names)}
    ends = {n: numbers[id(t)] for n, t in zip(outputs, functional.outputs, strict=True)}
    return Net(parts, steps, given, ends), kept


def _functional(model: Any) -> Any:
    """The graph of a model, which a sequence of layers has inside."""
    return getattr(model, "_functional", None) or model


def _nodes(functional: Any) -> Iterator[Any]:
    """The calls in an order in which each has its inputs."""
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
            if node.operation and not node.is_input:
                yield node


def _places(value: Any, numbers: dict[int, int]) -> Any:
    """Arguments with a place for each of Keras's symbolic tensors."""
    if id(value) in numbers:
        return Place(numbers[id(value)])
    if isinstance(value, (list, tuple)):
        return [_places(each, numbers) for each in value]
    if isinstance(value, dict):
        return {name: _places(each, numbers) for name, each in value.items()}
    return value


def _free(name: str, parts: dict[str, nn.Module]) -> str:
    """A name that a module can have, as near to a layer's own as may be."""
    made = name.replace("/", "_").replace(".", "_")
    while made in parts or hasattr(nn.Module, made) or made in ("steps", "inputs", "outputs"):
        made += "_"
    return made


def _layer(layer: Any, kwargs: dict[str, Any]) -> tuple[Layer, list[str]]:
    """A layer in torch's own, and the names of those in it that stay Keras's."""
    if (hasattr(layer, "_nodes_by_depth") or hasattr(layer, "_functional")) and not kwargs:
        inside = _functional(layer)
        names = [str(number) for number in range(len(inside.inputs))]
        net, kept = told(layer, names, [f"out_{number}" for number in range(len(inside.outputs))])
        return whole(Inner(net)), kept
    made = _by_op(layer) or _by_table(layer, kwargs)
    if made is not None:
        return made, []
    module = layer if isinstance(layer, nn.Module) else Operation(layer)
    return Layer(module, own), [str(layer.name)]


def _by_op(layer: Any) -> Layer | None:
    """An op between two values, or a value and a number, in whatever order they lie."""
    function = OPS.get(type(layer).__name__)
    if function is None or not type(layer).__module__.startswith("keras.src.ops"):
        return None

    def call(module: nn.Module, *given: Any) -> Value:
        aligned = iter(same([each for each in given if isinstance(each, Value)]))
        taken = [next(aligned) if isinstance(each, Value) else each for each in given]
        first = next(each for each in taken if isinstance(each, Value))
        return Value(
            function(*(each.tensor if isinstance(each, Value) else each for each in taken)),
            first.is_first,
        )

    return Layer(nn.Identity(), call)


def _by_table(layer: Any, kwargs: dict[str, Any]) -> Layer | None:
    name = type(layer).__name__
    if not type(layer).__module__.startswith("keras.src.layers") or name not in TABLE:
        return None
    if name == "MultiHeadAttention" and set(kwargs) <= {"use_causal_mask"}:
        made = attention.attention(layer, bool(kwargs.get("use_causal_mask")))
    else:
        made = None if kwargs else TABLE[name](layer)
    chosen = getattr(layer, "activation", None)
    if made is None or chosen is None or name in WITHIN or name in recurrent.TABLE:
        return made
    if getattr(chosen, "__name__", "") == "linear":
        return made
    after = activations.function(chosen)
    return None if after is None else made.then(after)
