"""Weights that are rounded alone, for XNNPACK, whose kernels round each row of the input.

ExecuTorch and LiteRT both run it: what its kernels take, and how tables are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph.quantized import grouped
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.state import remove_state, set_buffer, tensor_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Rounded:
    """A weight behind its quantizer: integers (R, F) in int8, scales and zero points (R, G)."""

    name: str
    axis: int
    group: int
    low: int
    high: int
    integers: Tensor
    scales: Tensor
    zero_points: Tensor | None
    values: Tensor  # the float weight, rounded, in its own shape

    @property
    def bits(self) -> int:
        return (self.high - self.low).bit_length()


def read(graph: fx.GraphModule, node: fx.Node) -> Rounded:
    """What a quantizer of a weight that is rounded alone makes of it."""
    source, scale, zero, axis, group, low, high = args_of(node)
    name, grid = str(source.target), (axis, group, low, high)
    weight, scales = (tensor_of(graph, str(each.target)).detach() for each in (source, scale))
    zeros = None if zero is None else tensor_of(graph, str(zero.target))
    integers = grouped.integers(weight, scales, zeros, *grid)
    return Rounded(name, *grid, integers, scales, zeros, PER_GROUP(weight, scales, zeros, *grid))


def fits(weight: Rounded) -> bool:
    """Whether a kernel reads it as it lies."""
    if weight.group and (weight.bits != 4 or weight.group % 32):
        return False
    whole = not weight.group or weight.integers.shape[1] % weight.group == 0
    return whole and weight.zero_points is None


def refuse_unfit(weight: Rounded) -> None:
    """Of a linear layer's weight.

    Raises:
        UserError: XNNPACK has no kernel for it.
    """
    features = weight.integers.shape[1]
    if not fits(weight):
        raise UserError(
            f"model: {weight.name!r} has weights of {weight.bits} bits in groups of "
            f"{weight.group or features}{'' if weight.zero_points is None else ' with zero points'}"
            f", {features} to a row. XNNPACK takes 8 bits with a scale for each channel, and 4 "
            "bits in groups of a multiple of 32 that divide a row, both without zero points: "
            "QuantizeWeights(4, group=32, zero_point=False), or exclude it."
        )


def look_up_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """A lookup picks integers, and then multiplies the picked rows alone by their scales.

    A table whose rows are no whole number of groups stays as it is.
    """
    source, places = args_of(node)[:2]
    if source.target is not PER_GROUP:
        return
    held, scale, zero, axis, group, low, high = args_of(source)
    name = str(held.target)
    weight, scales = (tensor_of(graph, str(each.target)).detach() for each in (held, scale))
    zeros = None if zero is None else tensor_of(graph, str(zero.target))
    grid = (axis, group, low, high)
    if group and weight.shape[1] % group:
        return

    def picked(part: str, values: Tensor) -> fx.Node:
        table = hold_before(graph, node, f"{name}_{part}", values)
        return add_before(node, aten.embedding.default, table, places)

    rows = picked("table", grouped.integers(weight, scales, zeros, *grid).to(torch.int8))
    made = add_before(node, aten.to.dtype, rows, torch.float32)
    if group:  # (..., F) -> (..., G, B)
        made = add_before(node, aten.unflatten.int, made, -1, [scales.shape[1], group])
    for op, values in ((aten.sub.Tensor, zeros), (aten.mul.Tensor, scales)):
        if values is not None:
            part = picked("zeros" if values is zeros else "scales", values.float())
            part = add_before(node, aten.unsqueeze.default, part, -1) if group else part
            made = add_before(node, op, made, part)
    replace_by(node, add_before(node, aten.flatten.using_ints, made, -2, -1) if group else made)
    if not source.users:
        graph.graph.erase_node(source)
        remove_state(graph, name)


# --- edits -----------------------------------------------------------------------------------


def add_before(before: fx.Node, op: Any, *args: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, args)


def replace_by(node: fx.Node, made: fx.Node) -> None:
    node.replace_all_uses_with(made)
    made.meta.setdefault("val", node.meta.get("val"))
    node.graph.erase_node(node)


def args_of(node: fx.Node) -> Any:
    """A node's arguments, whose types its op fixes."""
    return node.args


def shape_of(node: Any) -> Any:
    """The shape that a node has on the example inputs."""
    return node.meta["val"].shape


def hold_before(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    set_buffer(graph, name, value)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)
