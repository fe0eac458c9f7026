"""A Keras file -> its model in torch's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.graph.doors.keras import file, loaded, net
from paredown.graph.doors.keras.value import Value
from paredown.graph.doors.opened import Opened, Wanted

AGREES = 1e-4  # of the largest output: how far torch's layers may be from Keras's
HALF_AGREES = 3e-2  # where Keras itself computes in 16 bits
SIZE = 32  # of a dimension that the file leaves open
MASKED = (
    "a mask goes through the model beside its values (mask_zero or Masking), so it is run by "
    "Keras's own code, of which each op is captured: it is right, and little in it can be cut"
)
LEFT = (
    "{} computed by Keras's own code, not by a layer of torch's, which is right, but not cut and "
    "not fused: {}"
)
SOFTMAX = "its output is a probability of each class (softmax), not its logit"


def open_keras(path: Path) -> Opened:
    """The model in a ``.keras`` or ``.h5`` file, run by torch's own layers where it has them.

    Nothing in the file is run as code; Keras reads it on its torch backend.

    Raises:
        UserError: it is damaged, has a lambda or a class of one's own, or Keras cannot read it.
    """
    loaded.library()
    file.config(path)
    model = loaded.load(path)
    names = _input_names(model)
    outputs = _output_names(model)
    inputs = tuple(_wanted(*each) for each in zip(names, model.inputs, strict=True))
    example = {each.name: _example(each, model) for each in inputs}
    module, notes = _module(path, model, names, outputs, example)
    open_ = [w for w in inputs if any(size is None for size in w.shape[1:])]
    notes += [f"input {w.name!r} is {SIZE} long where the file leaves its size open" for w in open_]
    ends = _ends_in_softmax(model)
    return Opened(
        module=module,
        inputs=inputs,
        example=example,
        dynamic={each.name: _varying(each) for each in inputs},
        outputs=tuple(outputs),
        kind="classification" if ends and len(model.outputs[0].shape) == 2 else None,
        card={"name": str(model.name), "architecture": type(model).__name__},
        notes=(*notes, *([SOFTMAX] if ends else [])),
    )


def _input_names(model: Any) -> list[str]:
    """What the inputs are called; Keras's own names are taken, each once."""
    found: list[str] = []
    for tensor in model.inputs:
        name = str(tensor.name).replace("/", "_").replace(".", "_")
        while name in found:
            name += "_"
        found.append(name)
    return found


def _output_names(model: Any) -> list[str]:
    """The keys where there is a dict of outputs, else the names of the layers that give them."""
    count = len(model.outputs)
    functional = getattr(model, "_functional", None) or model
    struct = getattr(functional, "_outputs_struct", None)
    is_named = isinstance(struct, dict) and len(struct) == count
    named: list[Any] = list(struct or ()) if is_named else functional.output_names
    names = [str(name).replace("/", "_").replace(".", "_") for name in named]
    return names if len(set(names)) == count else [f"output_{n}" for n in range(count)]


def _wanted(name: str, tensor: Any) -> Wanted:
    if tensor.dtype == "string":
        raise UserError(
            f"input {name!r}: takes texts, which no runtime's file does; save the model without "
            "its TextVectorization or StringLookup, and let the samples have their numbers."
        )
    return Wanted(name, str(tensor.dtype), (None, *tensor.shape[1:]))


def _example(wanted: Wanted, model: Any) -> Tensor:
    """Inputs of one, of numbers that every embedding has."""
    shape = tuple(size if isinstance(size, int) else SIZE for size in wanted.shape[1:])
    draw = torch.Generator().manual_seed(0)
    every = model._flatten_layers(include_self=False, recursive=True)
    least = min((int(each.input_dim) for each in every if hasattr(each, "input_dim")), default=0)
    if least or not wanted.dtype.startswith("float"):
        dtype = getattr(torch, wanted.dtype)
        return torch.randint(0, least or 2, (1, *shape), generator=draw).to(dtype)
    return torch.rand((1, *shape), generator=draw)


def _varying(wanted: Wanted) -> dict[int, str] | None:
    """The dimensions that the file leaves open."""
    found = {dim: f"size_{dim}" for dim, size in enumerate(wanted.shape) if dim and size is None}
    return found or None


def _module(
    path: Path, model: Any, names: list[str], outputs: list[str], example: dict[str, Tensor]
) -> tuple[nn.Module, list[str]]:
    """The model in torch's layers where it computes the same, and sentences on what does not."""
    keras = _of_keras(model, names, outputs)
    if net.masked(model):
        return keras, [MASKED]
    made, own = net.told(model, names, outputs)
    made.eval()
    worst = _apart(made, keras, example)
    limit = HALF_AGREES if "16" in str(model.dtype_policy.name) else AGREES
    if not worst <= limit:
        raise UserError(
            f"{path}: told in torch's layers it computes something else than Keras does (apart by "
            f"{worst:.2g} of the largest output); report the model, and load it in model() of a "
            "Python file meanwhile."
        )
    count = f"{len(own)} layers are" if own[1:] else "one layer is"
    notes = [LEFT.format(count, ", ".join(own[:5]))] if own else []
    if limit == HALF_AGREES:
        notes.append(f"Keras computes it in 16 bits ({model.dtype_policy.name}), here in 32")
    return made, notes


def _of_keras(model: Any, names: list[str], outputs: list[str]) -> net.Net:
    """The whole model as one layer of Keras's."""
    places = [net.Place(number) for number in range(len(names))]
    given = {name: number for number, name in enumerate(names)}
    gives = {name: len(names) + number for number, name in enumerate(outputs)}
    args = [places] if places[1:] else places
    step = net.Step("model", whole_of_keras, args, {}, tuple(gives.values()))
    return net.Net({"model": model}, [step], given, gives).eval()


def whole_of_keras(model: Any, *args: Any) -> list[Value]:
    """A model of Keras's, whose outputs come in one list."""
    import keras

    found = model(*net.plain(args), training=model.training)
    return [Value(each) for each in keras.tree.flatten(found)]


@torch.no_grad()
def _apart(made: nn.Module, keras: nn.Module, example: dict[str, Tensor]) -> float:
    """How far apart two models are on a few inputs, of the largest output."""
    wide = {name: torch.cat([value, value.roll(1, -1)]) for name, value in example.items()}
    worst = 0.0
    ours, theirs = made(**wide), keras(**wide)
    ours, theirs = ([x] if isinstance(x, Tensor) else list(x.values()) for x in (ours, theirs))
    for mine, its in zip(ours, theirs, strict=True):
        if mine.shape != its.shape:
            return float("inf")
        scale = max(float(its.abs().max()), 1e-6)
        worst = max(worst, float((mine.to(its.dtype) - its).abs().max()) / scale)
    return worst


def _ends_in_softmax(model: Any) -> bool:
    layer = model.layers[-1]
    chosen = getattr(getattr(layer, "activation", None), "__name__", "")
    one = len(model.outputs) == 1
    return one and (chosen == "softmax" or type(layer).__name__ == "Softmax")
