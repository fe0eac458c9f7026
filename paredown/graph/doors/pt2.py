"""A program that torch.export has saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.doors import sizes
from paredown.graph.doors.example import Example
from paredown.graph.doors.module import capture_module, check_parameters
from paredown.graph.model import Model
from paredown.graph.parts import Limit, told


def capture_program(path: Path, example: Example | None, dynamic: Any) -> Model:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable .pt2 program: {error}") from error
    module = program.module(check_guards=False)
    check_parameters(module)
    if example is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        example = kwargs if kwargs and not args else args
        if args and kwargs:
            raise UserError(f"{path}: mixes positional and keyword inputs; pass an example.")
    if example is None:
        raise UserError(f"{path}: holds no example inputs; pass an example.")
    model = capture_module(module, example, dynamic or _dynamic_of(program, example))
    model = _within_ranges(model, program)
    note = f"{path.name} was exported already: training behaves as it did at its export."
    return replace(model, notes=(*model.notes, note))


def _within_ranges(model: Model, program: Any) -> Model:
    """The model with what a program was exported for as limits of its sizes."""
    guards = sizes.Guards.of(program)
    user = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    nodes = [node for node in nodes if isinstance(node.meta["val"], Tensor)]
    leaves, names = [i.example for i in model.inputs], [i.dynamic for i in model.inputs]

    def agrees(made: list[Tensor]) -> bool:
        return not guards.broken([leaf.shape for leaf in made])

    inputs, notes = [], list(model.notes)
    exported = sizes.limits(nodes, guards, leaves, names, agrees)
    for item, limits in zip(model.inputs, exported, strict=True):
        dynamic = {dim: name for dim, name in item.dynamic.items() if dim in limits}
        both = {dim: _both(limits[dim], item.limits.get(dim, (1, None))) for dim in dynamic}
        kept = {dim: limit for dim, limit in both.items() if limit != (1, None)}
        inputs.append(replace(item, dynamic=dynamic, limits=kept))
        for dim, name in item.dynamic.items():
            if dim not in dynamic or kept.get(dim) != item.limits.get(dim):
                only = told(kept[dim]) if dim in kept else f"{item.example.shape[dim]} alone"
                notes.append(
                    f"dimension {dim} ({name}) of input {item.name!r} may be {only}: the program "
                    "was exported for no other sizes"
                )
    return replace(model, inputs=tuple(inputs), notes=tuple(notes))


def _both(one: Limit, other: Limit) -> Limit:
    """What two limits allow together."""
    most = [limit[1] for limit in (one, other) if limit[1] is not None]
    return max(one[0], other[0]), min(most, default=None)


def _dynamic_of(program: Any, example: Example) -> Example:
    """The dynamic dimensions that a program was exported with, in the shape of its example."""
    kinds = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    values = [
        n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in kinds
    ]
    tensors = iter([value for value in values if isinstance(value, Tensor)])

    def spec(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        sizes = next(tensors).shape
        return {d: f"dim_{s}" for d, s in enumerate(sizes) if d and not isinstance(s, int)} or None

    if isinstance(example, dict):
        return {name: spec(value) for name, value in example.items()}
    return tuple(spec(value) for value in example)
