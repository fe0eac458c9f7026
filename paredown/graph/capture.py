"""Anything a user brings -> Model: an ``nn.Module``, a Python file, a ``.pt2`` program, a file
without source by the doors of `paredown.graph.doors.files`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from paredown.core.errors import UserError
from paredown.core.settings import check_arguments, described
from paredown.core.task import Task
from paredown.graph import structure
from paredown.graph.doors.example import Example
from paredown.graph.doors.files import ending, open_file
from paredown.graph.doors.module import capture_module, check_parameters
from paredown.graph.doors.opened import Opened
from paredown.graph.doors.pt2 import capture_program
from paredown.graph.doors.python_file import call_user, functions_of, load_file
from paredown.graph.model import Model


def capture(
    module: nn.Module | Model | str | Path,
    example: Example | None = None,
    dynamic: tuple[Any, ...] | dict[str, Any] | None = None,
) -> Model:
    """Capture a model once, as a graph that runs, trains and exports.

    The module stays as it is, and what is done to it afterwards does not reach the capture, nor the
    other way round; until then both hold their weights in the same memory.

    Args:
        module: an ``nn.Module``, a Python file that defines ``model()`` and (unless ``example`` is
            given) ``task()``, or a ``.pt2`` file. Both files are code: name only those you trust.
            A file without source, such as an ONNX file, is data; its model is called by keyword.
        example: inputs as deployed, batch dimension first; a tuple, or a dict of keyword inputs.
            Comes from the task where ``module`` is a Python file, from the program for a ``.pt2``,
            and is made from what it declares for a file without source.
        dynamic: dimensions besides the batch that vary: for each input ``{dim: "name"}`` or None.

    Raises:
        UserError: the model cannot be captured; says why, at which line of its code, and what
            usually helps.

    Example:
        >>> import torch
        >>> capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),)).inputs[0].name
        'input'
    """
    check_arguments(example=(example, tuple | dict | None), dynamic=(dynamic, tuple | dict | None))
    if isinstance(module, Model):
        return module
    if isinstance(module, (str, Path)):
        return _capture_file(Path(module), example, dynamic)
    if not isinstance(module, nn.Module):
        raise UserError(f"model: expected an nn.Module, got {described(module)}.")
    if example is None:
        raise UserError("example: capture(module, example) needs the inputs as deployed.")
    check_parameters(module)
    return capture_module(module, example, dynamic)


def _capture_file(path: Path, example: Example | None, dynamic: Any) -> Model:
    if path.suffix == ".pt2":
        return capture_program(path, example, dynamic)
    if path.suffix == ".safetensors":
        return Model.load(path)
    if ending(path) is not None:
        return _capture_opened(open_file(path), path, example, dynamic)
    if example is not None:
        (model,) = functions_of(path, ("model",))
        return capture(call_user(model, path), example, dynamic)
    model, task = load_file(path)
    made: Task = call_user(task, path)
    return capture(call_user(model, path), made.example, dynamic or made.dynamic)


def _capture_opened(opened: Opened, path: Path, example: Example | None, dynamic: Any) -> Model:
    """What a door made of a file without source, with what it told of it."""
    chosen = example if example is not None else opened.example
    if chosen is None:
        raise UserError(f"{path}: tells of no example inputs; pass an example.")
    names = [each.name for each in opened.inputs]
    if isinstance(dynamic, (tuple, list)) and len(dynamic) == len(names):
        dynamic = dict(zip(names, dynamic, strict=True))
    named = _named(opened, chosen, path)
    made = () if example is not None else _made_note(opened, named)
    return capture_opened(opened, named, opened.dynamic if dynamic is None else dynamic, made)


def capture_opened(
    opened: Opened, example: dict[str, Any], dynamic: Any, made: tuple[str, ...] = ()
) -> Model:
    """The capture of what a door opened, with the door's notes, those on how its example was made,
    and its name of the output."""
    check_parameters(opened.module)
    model = capture_module(opened.module, example, dynamic)
    outputs = model.outputs
    if outputs == "*" and len(opened.outputs) == 1:
        outputs = structure.alone(opened.outputs[0])
    return replace(model, outputs=outputs, notes=(*opened.notes, *made, *model.notes))


def _made_note(opened: Opened, example: dict[str, Any]) -> tuple[str, ...]:
    """Which sizes and values an example has that no file told."""
    told = [
        f"{each.name} {tuple(example[each.name].shape)}"
        for each in opened.inputs
        if not all(isinstance(size, int) for size in each.shape)
    ]
    sentence = (
        f"the file leaves sizes of its inputs open: the example made for it is {', '.join(told)}, "
        "whole numbers zero; give an example to have others"
    )
    return (sentence,) if told else ()


def _named(opened: Opened, example: Example, path: Path) -> dict[str, Any]:
    """An example by the names of the file's inputs, which is how the module is called."""
    names = [each.name for each in opened.inputs]
    if isinstance(example, dict):
        missing = [name for name in names if name not in example]
        if missing:
            raise UserError(
                f"example: lacks input {missing[0]!r} of {path.name}, which wants "
                f"{', '.join(names)}."
            )
        return {name: example[name] for name in names}
    if len(example) != len(names):
        raise UserError(
            f"example: has {len(example)} inputs, and {path.name} wants {len(names)}: "
            f"{', '.join(names)}."
        )
    return dict(zip(names, example, strict=True))
