"""Nets of the zoo in an original's place: with its inputs, outputs and names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.core.errors import UserError
from paredown.core.settings import check_above_zero
from paredown.core.task import Task
from paredown.graph import machine, structure
from paredown.graph.capture import capture
from paredown.graph.layout import gives_channels_last, takes_channels_last
from paredown.graph.model import Model
from paredown.graph.state import tensor_of
from paredown.zoo import entry
from paredown.zoo.like import Shape, like

PREFIX = "zoo:"
LENGTH = 512  # tokens at most, where an original says nothing of it
KEEPS_TOKENS = {  # ops behind which tokens are still what they were
    torch.ops.aten.to.dtype,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
}


@dataclass(frozen=True)
class Scale:
    """What a net's channels, blocks and images are multiplied by."""

    width: float = 1.0
    depth: float = 1.0
    resolution: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_above_zero(name, value)


def is_name(student: object) -> bool:
    return isinstance(student, str) and student.startswith(PREFIX)


def problem(student: str) -> str:
    """What is wrong with a name; "" where nothing is."""
    try:
        entry(student.removeprefix(PREFIX))
    except UserError as error:
        return f"student: {error}"
    return ""


def told(student: str, scale: Scale) -> str:
    """What a student's graph follows from, besides its original."""
    return f"{student} {astuple(scale)}"


def found(student: str, task: Task, original: Model, scale: Scale, seed: int) -> Model:
    """The net of that name, captured, in evaluation mode, with weights that are random.

    Raises:
        UserError: there is none of that name, or it takes or gives something else.
    """
    shape = shape_of(original)
    name = student.removeprefix(PREFIX)
    with machine.same_numbers(seed):
        try:
            net = like(name, shape, scale.width, scale.depth, scale.resolution)
        except UserError as error:
            raise UserError(f"student: {error}") from error
    last, gives_last = _channels_last(original)
    plain = original.outputs == "*" and not original.arguments["tuple"][1]["dict"]
    placed = net if plain and not last else _InPlace(net, original.outputs, last, gives_last)
    made = capture(placed, task.example, task.dynamic)
    pairs = zip(made.inputs, original.inputs, strict=True)
    return replace(made, inputs=tuple(replace(a, name=b.name) for a, b in pairs)).eval()


class _InPlace(nn.Module):
    """A net that is called as the original is, and gives its one tensor in the same nesting.

    Args:
        last, gives_last: whether the original takes, and gives, pictures with their channels last.
    """

    def __init__(
        self, net: nn.Module, outputs: structure.Structure, last: bool, gives_last: bool
    ) -> None:
        super().__init__()
        self.net, self.outputs, self.last, self.gives_last = net, outputs, last, gives_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = structure.flatten((args, kwargs))
        made = self.net(*[leaf.movedim(-1, 1) for leaf in leaves] if self.last else leaves)
        return structure.unflatten([made.movedim(1, -1) if self.gives_last else made], self.outputs)


def _channels_last(original: Model) -> tuple[bool, bool]:
    """Whether it takes pictures with their channels last, and whether it then gives such maps."""
    last = len(original.inputs) == 1 and takes_channels_last(original.graph)
    return last, last and gives_channels_last(original.graph)


def shape_of(original: Model) -> Shape:
    """What a net has to take and give to stand in its place."""
    leaves = [item.example for item in original.inputs]
    with torch.no_grad():
        outputs = list(original.graph(*[leaf.clone() for leaf in leaves]))
    last, gives_last = _channels_last(original)
    if last:
        leaves = [leaves[0].movedim(-1, 1)]
    if gives_last:
        outputs = [outputs[0].movedim(-1, 1), *outputs[1:]]
    first = original.inputs[0]
    length = first.example.shape[1] if first.example.dim() > 1 else 0
    if 1 in first.dynamic:
        length = first.limits.get(1, (1, None))[1] or max(LENGTH, length)
    return Shape(leaves, outputs, _vocabulary(original), length)


def _vocabulary(original: Model) -> int:
    """The rows of the table that the first input is looked up in; 0 where there is none."""
    placeholders = [node for node in original.graph.graph.nodes if node.op == "placeholder"]
    for user in _readers(placeholders[0]):
        if user.target is torch.ops.aten.embedding.default:
            table = user.args[0]
            if isinstance(table, fx.Node) and table.op == "get_attr":
                held: Tensor = tensor_of(original.graph, str(table.target))
                return held.shape[0]
    return 0


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Every op that reads a value, also behind ops that keep what it holds."""
    for user in node.users:
        yield user
        if user.target in KEEPS_TOKENS:
            yield from _readers(user)
