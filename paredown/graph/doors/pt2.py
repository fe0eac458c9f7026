"""A program that torch.export has saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph.doors.module import Example, capture_module
from paredown.graph.model import Model


def capture_program(path: Path, example: Example | None, dynamic: Any) -> Model:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise UserError(f"{path}: not a readable .pt2 program: {error}") from error
    module = program.module(check_guards=False)
    if example is None and program.example_inputs is not None:
        args, kwargs = program.example_inputs
        example = kwargs if kwargs and not args else args
        if args and kwargs:
            raise UserError(f"{path}: mixes positional and keyword inputs; pass an example.")
    if example is None:
        raise UserError(f"{path}: holds no example inputs; pass an example.")
    model = capture_module(module, example, dynamic or _dynamic_of(program, example))
    note = f"{path.name} was exported already: training behaves as it did at its export."
    return replace(model, notes=(*model.notes, note))


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
