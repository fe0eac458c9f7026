"""Which outputs of a model are logits of classes, as the labels tell, and which are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.data.scores import IGNORE
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.train.distill.inner_values import View, channel_dim


@dataclass(frozen=True)
class Output:
    """One output that is taught: its place and name, the loss, the dimension of its classes (None
    where it has none), the place of its label among the target's tensors (None where unknown), and
    the labels that do not count.
    """

    index: int
    name: str
    loss: str
    classes: int | None
    label: int | None
    ignore: tuple[int, ...] = (IGNORE,)


def class_dim(output: Tensor, label: Tensor, usual: int) -> int | None:
    """The dimension of an output that holds the classes of which the label may be one, as shapes
    and dtype tell; None if none.

    Example:
        >>> tokens = torch.zeros(2, 5, dtype=torch.long)
        >>> class_dim(torch.zeros(2, 5, 9), tokens, 2), class_dim(torch.zeros(2, 9, 5), tokens, 1)
        (2, 1)
        >>> class_dim(torch.zeros(2, 1), torch.zeros(2), 1) is None
        True
    """
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        return None
    fitting = [
        dim
        for dim in range(1, output.dim())
        if output.shape[:dim] + output.shape[dim + 1 :] == label.shape and output.shape[dim] > 1
    ]
    if not fitting:
        return None
    return usual if usual in fitting else fitting[0]


def ignored(
    values: Sequence[int], classes: int, given: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """The labels that do not count, of all that occur; None where they are no labels of so many
    classes.

    Where none are given, one value outside the classes is such a label, -100 if none is there; not
    so the last of labels that count from 1.

    Example:
        >>> ignored([0, 1, 255], 3, None), ignored([0, 2], 3, None), ignored([1, 2, 3], 3, None)
        ((255,), (-100,), None)
    """
    outside = tuple(value for value in values if not 0 <= value < classes)
    if given is not None:
        return given if set(outside) <= set(given) else None
    if not outside:
        return (IGNORE,)
    from_one = outside == (classes,) and 0 not in values
    return outside if len(outside) == 1 and not from_one else None


def outputs_of(
    model: Model,
    view: View,
    found: Sequence[Tensor],
    target: Any,
    loss: str,
    values: Sequence[Sequence[int]] | None = None,
    ignore: tuple[int, ...] | None = None,
) -> list[Output]:
    """The outputs that can be taught, each with its loss.

    Args:
        found: the outputs of a few examples, and ``target`` theirs.
        values: of each of the target's tensors all whole numbers that occur in the split; None
            takes those of ``target``.
        ignore: labels that do not count; None finds them (`ignored`).

    Raises:
        UserError: no output is of floats, none has classes for a loss that compares classes, or
            the labels are others than those of the classes.
    """
    names = structure.names(model.outputs)
    labels = structure.flatten(target)[0]
    values = [distinct(label) for label in labels] if values is None else values
    nodes = list(model.graph.graph.output_node().args[0])  # type: ignore[arg-type]
    made, strange = [], []
    for index, (name, value) in enumerate(zip(names, found, strict=True)):
        if not value.is_floating_point():
            continue
        node = nodes[index]
        usual = channel_dim(node, view.shapes) if node in view.shapes else 1
        dim = usual if value.dim() > 1 and value.shape[usual] > 1 else None
        plain = Output(index, name, "", dim, None)
        for number, label in enumerate(labels):
            classes = class_dim(value, label, usual)
            if classes is None:
                continue
            skipped = ignored(values[number], value.shape[classes], ignore)
            if skipped is not None:
                plain = Output(index, name, "", classes, number, skipped)
                break
            strange.append((name, value.shape[classes], values[number]))
        made.append(plain)
    if not made:
        raise UserError("model: no output is of floats, so there is nothing to learn from.")
    if strange and loss != "squared" and all(output.label is None for output in made):
        raise _strange(*strange[0])
    return [_with_loss(output, made, loss) for output in made]


def distinct(label: Tensor) -> list[int]:
    """The whole numbers that occur, in order; none of what is not whole."""
    whole = not (label.is_floating_point() or label.is_complex() or label.dtype == torch.bool)
    return label.unique().tolist() if whole else []


def _strange(name: str, classes: int, values: Sequence[int]) -> UserError:
    outside = [value for value in values if not 0 <= value < classes]
    shown = ", ".join(map(str, outside[:4])) + (", ..." if len(outside) > 4 else "")
    output = f"output {name!r}" if name else "the output"
    return UserError(
        f"task: {output} has {classes} classes, 0 to {classes - 1}, and its labels are also "
        f'{shown}; say with Task(ignore=...) which do not count, or set loss="squared" where '
        "they are no classes."
    )


def _with_loss(output: Output, every: list[Output], asked: str) -> Output:
    labelled = any(each.label is not None for each in every)
    if asked in ("softened", "decoupled") and not any(o.classes is not None for o in every):
        raise UserError(f'loss: "{asked}" compares classes, and no output has any; use "squared".')
    logits = output.label is not None or (not labelled and asked != "auto")
    chosen = "softened" if asked == "auto" else asked
    if not logits or output.classes is None:
        chosen = "squared"
    return replace(output, loss=chosen)


def described(outputs: Sequence[Output], temperature: float) -> str:
    """What is learnt of the outputs, for the progress.

    Example:
        >>> described([Output(0, "logits", "softened", 1, 0)], 4.0)
        'output logits: softened, temperature 4, classes in dimension 1'
    """
    parts = []
    for output in outputs:
        text = f"output {output.name}".strip() + f": {output.loss}"
        if output.loss != "squared":
            text += f", temperature {temperature:g}, classes in dimension {output.classes}"
        if output.loss != "squared" and output.label is not None and output.ignore != (IGNORE,):
            text += f", labels of {' and '.join(map(str, output.ignore))} do not count"
        parts.append(text)
    return "; ".join(parts)
