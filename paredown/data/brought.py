"""A model that came without its source, and how samples reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.graph import structure
from paredown.graph.capture import capture, capture_opened
from paredown.graph.doors import files
from paredown.graph.doors.opened import Opened, Wanted
from paredown.graph.doors.other_files import told
from paredown.graph.model import Model

CAPTURED = (".pt2", ".safetensors")  # files of graphs, which are captured already
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Brought:
    """What a file without source holds.

    Attributes:
        wanted: the inputs.
        captured: makes of an example, batch first and by name, the model.
        nest: makes of one example's tensors by name what the model is called with.
        opened: what its door says of it; None where it is a graph already.
    """

    wanted: tuple[Wanted, ...]
    captured: Callable[[Named], Model]
    nest: Callable[[Named], Any]
    opened: Opened | None = None

    @property
    def batch(self) -> int:
        """Examples of one inference, as the file has them."""
        fixed = [item.shape[0] for item in self.wanted if item.shape]
        return next((size for size in fixed if isinstance(size, int)), 1)


def check_door(file: Path) -> None:
    """Refuse a path that is no model without source.

    Raises:
        UserError: says what it is, and what was expected.
    """
    if not file.exists() or (file.suffix not in CAPTURED and files.ending(file) is None):
        raise UserError(told(file))


def brought(file: Path) -> Brought:
    """What a file without source holds.

    Raises:
        UserError: no door takes it, or it is damaged; says why.
    """
    check_door(file)
    if file.suffix in CAPTURED:
        return _of_graph(capture(file))
    opened = files.open_file(file)

    def captured(example: Named) -> Model:
        return _captured(opened, dict(example))

    return Brought(opened.inputs, captured, dict, opened)


def model_of(file: Path) -> Model:
    """The model alone, captured with the example that the file tells of.

    Raises:
        UserError: as `brought`, or the file tells of no example.
    """
    check_door(file)
    return capture(file)


def _captured(opened: Opened, example: dict[str, Tensor]) -> Model:
    dynamic = opened.dynamic
    if isinstance(dynamic, dict):
        dynamic = {name: each for name, each in dynamic.items() if name in example} or None
    return capture_opened(opened, example, dynamic)


def _of_graph(model: Model) -> Brought:
    wanted = tuple(
        Wanted(
            item.name,
            str(item.example.dtype).removeprefix("torch."),
            tuple(item.dynamic.get(dim, size) for dim, size in enumerate(item.example.shape)),
        )
        for item in model.inputs
    )
    return Brought(wanted, lambda example: model, lambda named: nested(model, named))


def nested(model: Model, named: Named) -> Any:
    """Tensors by the names of a model's inputs as a split gives them: one, a tuple, or a dict.

    Raises:
        UserError: the model is called by position and by keyword at once.
    """
    args, kwargs = structure.unflatten([named[i.name] for i in model.inputs], model.arguments)
    if args and kwargs:
        raise UserError(
            "model: is called by position and by keyword at once, which samples cannot be; capture "
            "it with one of the two."
        )
    return kwargs or (args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args)


def example_of(model: Model) -> tuple[Any, ...] | dict[str, Any]:
    """The example that a model was captured with, as a task has it."""
    made = nested(model, {item.name: item.example for item in model.inputs})
    return (made,) if isinstance(made, Tensor) else made


def dynamic_of(model: Model) -> Any:
    """The dimensions besides the batch that vary, in the shape of the example; None where none
    does, or where inputs are within others, which a task cannot say it of."""
    example = example_of(model)
    found = [{d: n for d, n in item.dynamic.items() if d} or None for item in model.inputs]
    values = list(example.values()) if isinstance(example, dict) else list(example)
    if not any(found) or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    return dict(zip(example, found, strict=True)) if isinstance(example, dict) else tuple(found)
