"""Which outputs of a model are logits of classes, as the labels tell, and which are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    where it has none) and the place of its label among the target's tensors (None where unknown).
    """

    index: int
    name: str
    loss: str
    classes: int | None
    label: int | None


def class_dim(output: Tensor, label: Tensor, usual: int) -> int | None:
    """The dimension of an output that holds the classes of which the label is one; None if none.

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
    valid = label[label != IGNORE]
    if not fitting or (valid.numel() and not int(valid.min()) >= 0):
        return None
    found = usual if usual in fitting else fitting[0]
    inside = not valid.numel() or int(valid.max()) < output.shape[found]
    return found if inside else None


def outputs_of(
    model: Model, view: View, found: Sequence[Tensor], target: Any, loss: str
) -> list[Output]:
    """The outputs that can be taught, each with its loss; ``found`` are those of a few examples.

    Raises:
        UserError: no output is of floats, or none has classes for a loss that compares classes.
    """
    names = structure.names(model.outputs)
    labels = structure.flatten(target)[0]
    nodes = list(model.graph.graph.output_node().args[0])  # type: ignore[arg-type]
    made = []
    for index, (name, value) in enumerate(zip(names, found, strict=True)):
        if not value.is_floating_point():
            continue
        node = nodes[index]
        usual = channel_dim(node, view.shapes) if node in view.shapes else 1
        dims = [class_dim(value, label, usual) for label in labels]
        label = next((n for n, dim in enumerate(dims) if dim is not None), None)
        dim = usual if value.dim() > 1 and value.shape[usual] > 1 else None
        made.append(Output(index, name, "", dim if label is None else dims[label], label))
    if not made:
        raise UserError("model: no output is of floats, so there is nothing to learn from.")
    return [_with_loss(output, made, loss) for output in made]


def _with_loss(output: Output, every: list[Output], asked: str) -> Output:
    labelled = any(each.label is not None for each in every)
    if asked in ("softened", "decoupled") and not any(o.classes is not None for o in every):
        raise UserError(f'loss: "{asked}" compares classes, and no output has any; use "squared".')
    logits = output.label is not None or (not labelled and asked != "auto")
    chosen = "softened" if asked == "auto" else asked
    if not logits or output.classes is None:
        chosen = "squared"
    return Output(output.index, output.name, chosen, output.classes, output.label)


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
        parts.append(text)
    return "; ".join(parts)
