"""The model that takes the original's place: what a user names -> Model, in this one place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.graph import structure
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.train.distill import zoo_students
from paredown.train.distill.zoo_students import Scale

Student = str | nn.Module | Model


def check_name(student: object, scale: Scale) -> str:
    """What is wrong with what a student is named by, seen without running it; "" where nothing
    is."""
    if zoo_students.is_name(student):
        return zoo_students.problem(str(student))
    if scale != Scale():
        return (
            "width, depth and resolution are those of a net of the zoo, such as "
            f'student="zoo:mobilenet_v2"; this student is {student!r}.'
        )
    if isinstance(student, (nn.Module, Model)):
        return ""
    if not isinstance(student, str) or not student.strip():
        return f'student: expected a file, "zoo:" and a name, or an nn.Module, got {student!r}.'
    if Path(student).is_file():
        return ""
    return (
        f"student: {student}: no such file in {Path.cwd()}, nor beside the file that names it; "
        "name a Python file that defines model(), a saved model (.safetensors, .pt2), or a net of "
        "the zoo (zoo:mobilenet_v2)."
    )


def found(student: Student, task: Task, original: Model, scale: Scale, seed: int = 0) -> Model:
    """The student, captured with the task's example, in evaluation mode; a copy.

    Args:
        original: what it takes the place of.
        scale, seed: of a net of the zoo, and of its first weights.

    Raises:
        UserError: it cannot be captured.
    """
    if isinstance(student, str) and zoo_students.is_name(student):
        made = zoo_students.found(student, task, original, scale, seed)
    else:
        made = captured(student, task)
    if made.outputs == "*" and "alone" in original.outputs:
        made = replace(made, outputs=original.outputs)  # a tensor to which a file gave a name
    return made


def captured(student: Student, task: Task) -> Model:
    """A student that is a file or in memory.

    Raises:
        UserError: it cannot be captured.
    """
    named = Path(student) if isinstance(student, str) else student
    try:
        return capture(named, task.example, task.dynamic).copy().eval()
    except UserError as error:
        raise UserError(f"student: {error}") from error


def check_fits(student: Model, original: Model) -> None:
    """Refuse a student that does not take the original's inputs, or gives other outputs.

    Raises:
        UserError: says what the original takes or gives, and what the student does.
    """
    if next(iter(student.parameters()), None) is None:
        raise UserError("student: has no parameters, so it cannot be taught anything.")
    given, wanted = _inputs(student), _inputs(original)
    same_way = structure.names(student.arguments) == structure.names(original.arguments)
    if given != wanted or not same_way:
        raise UserError(
            f"student: expected inputs as the original's, {_told(original, wanted)}; got "
            f"{_told(student, given)}."
        )
    leaves = [item.example for item in original.inputs]
    with torch.no_grad():
        ours, theirs = (list(m.graph(*[t.clone() for t in leaves])) for m in (student, original))
    check_outputs(student, ours, original, theirs)


def check_outputs(
    student: Model, ours: list[Tensor], original: Model, theirs: list[Tensor]
) -> None:
    """Refuse a student whose outputs are not as many, or of other names, shapes or dtypes.

    Raises:
        UserError: says what the original gives and what the student gives.
    """
    given, wanted = _outputs(student, ours), _outputs(original, theirs)
    if given != wanted:
        raise UserError(f"student: expected outputs as the original's, {wanted}; got {given}.")


def _inputs(model: Model) -> list[tuple[Any, ...]]:
    """Of each input the dtype and the shape, with None for what varies."""
    return [
        (
            item.example.dtype,
            *(None if dim in item.dynamic else size for dim, size in enumerate(item.example.shape)),
        )
        for item in model.inputs
    ]


def _told(model: Model, inputs: list[tuple[Any, ...]]) -> str:
    pairs = zip(model.inputs, inputs, strict=True)
    return ", ".join(
        f"{item.name} ({', '.join('?' if s is None else str(s) for s in shape)}) "
        f"{str(dtype).removeprefix('torch.')}"
        for item, (dtype, *shape) in pairs
    )


def _outputs(model: Model, found: list[Tensor]) -> str:
    pairs = zip(structure.names(model.outputs), found, strict=True)
    return ", ".join(
        f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}".strip()
        for name, t in pairs
    )
