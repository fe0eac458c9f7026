"""Weights that are rounded alone, for XNNPACK, whose kernels round each row of the input.

ExecuTorch and LiteRT both run it: what its kernels take, and how tables are looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.core.errors import UserError
from paredown.graph.quantized.forms import Rounded
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.quantizers import read
from paredown.graph.state import remove_state, set_buffer

aten = torch.ops.aten


def fits(weight: Rounded) -> bool:
    """Whether a kernel reads it as it lies."""
    if weight.group and (weight.form.bits != 4 or weight.group % 32):
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
            f"model: {weight.name!r} has weights of {weight.form.bits} bits in groups of "
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
    weight = read(graph, source)
    scales, zeros, group = weight.scales, weight.zero_points, weight.group
    if group and weight.integers.shape[1] % group:
        return

    def picked(part: str, values: Tensor) -> fx.Node:
        table = hold_before(graph, node, f"{weight.name}_{part}", values)
        return add_before(node, aten.embedding.default, table, places)

    rows = picked("table", weight.integers)
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
        remove_state(graph, weight.name)


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
