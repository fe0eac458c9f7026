"""Rewrites that let XNNPACK's kernels take the integers."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from paredown.graph.ops import argument
from paredown.graph.quantized.decomposed import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from paredown.graph.quantized.forms import Rounded
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.quantizers import read
from paredown.graph.quantized.regions import FOLLOWERS
from paredown.graph.state import remove_state, tensor_of
from paredown.targets.formats.rowwise import (
    add_before,
    args_of,
    hold_before,
    refuse_unfit,
    replace_by,
    shape_of,
)

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed
UNBOUNDED = torch.finfo(torch.float32).max
DEQUANTIZE_GROUP = ops.dequantize_per_channel_group.default
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.matmul.default)
MOST_RESCALED = 256.0  # input scale times weight scale over output scale, in XNNPACK's kernels
# The least that input scale over output scale may be; of a product, both input scales multiplied.
LEAST_RATIO: dict[Any, float] = {
    **{aten.add.Tensor: 2.0**-10, aten.sub.Tensor: 2.0**-10},
    **{aten.mul.Tensor: 2.0**-16, aten.mean.dim: 2.0**-8},
}


# --- integer ops -----------------------------------------------------------------------------


def drop_clamp(graph: fx.GraphModule, node: fx.Node) -> None:
    """A ReLU goes where the quantize op behind it clips at the same levels; else it fuses."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not QUANTIZE:
        return
    scale, zero, low, high = args_of(users[0])[1:5]
    bottom, top = _bounds(node)
    if round(bottom / scale) + zero <= low and round(top / scale) + zero >= high:
        replace_by(node, args_of(node)[0])
    elif node.target is aten.clamp.default:
        replace_by(node, add_before(node, aten.hardtanh.default, node.args[0], bottom, top))


def _bounds(node: fx.Node) -> tuple[float, float]:
    if node.target in (aten.relu.default, aten.relu6.default):
        return 0.0, 6.0 if node.target is aten.relu6.default else UNBOUNDED
    tanh = node.target is aten.hardtanh.default
    low = argument(node, "min_val" if tanh else "min")
    high = argument(node, "max_val" if tanh else "max")
    return -UNBOUNDED if low is None else low, UNBOUNDED if high is None else high


def turn_product(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product with an integer weight (in, out) becomes a linear layer with one of (out, in)."""
    bias, x, weight = node.args if len(node.args) == 3 else (None, *args_of(node))
    if not isinstance(weight, fx.Node) or node.kwargs:
        return
    if weight.target not in (DEQUANTIZE_CHANNEL, PER_GROUP) or weight.args[3] != 1:
        return
    source, scale, zeros, axis, *rest = args_of(weight)
    turned = tensor_of(graph, str(source.target)).t().contiguous()  # (out, in)
    held = hold_before(graph, node, f"{source.target}_turned", turned)
    made = add_before(node, weight.target, held, scale, zeros, 1 - axis, *rest)
    replace_by(node, add_before(node, aten.linear.default, x, made, bias))
    if not weight.users:
        graph.graph.erase_node(weight)
        remove_state(graph, str(source.target))


def hold_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """Weights that are rounded alone: as integers where a linear layer reads them, whose kernel
    rounds each row of the input; rounded floats for other layers, which have no such kernel."""
    weight = read(graph, node)
    linear = weight.axis == 0 and all(
        user.target is aten.linear.default and user.args[1] is node for user in node.users
    )
    if not linear:
        made = hold_before(graph, node, f"{weight.name}_rounded", weight.values())
    else:
        refuse_unfit(weight)
        made = _integer_weight(graph, node, weight)
    replace_by(node, made)
    for user in list(made.users)[1:] if linear else []:  # each to one kernel with its own
        user.replace_input_with(made, add_before(user, made.target, *made.args))
    remove_state(graph, weight.name)


def _integer_weight(graph: fx.GraphModule, node: fx.Node, weight: Rounded) -> fx.Node:
    held = hold_before(graph, node, f"{weight.name}_quantized", weight.integers)
    scales, low, high = weight.scales, weight.form.low, weight.form.high
    none = torch.zeros(scales.shape if weight.group else scales.shape[:1], dtype=torch.int64)
    empty = hold_before(graph, node, f"{weight.name}_zero", none)
    if weight.group:
        rest = (low, high, torch.int8, weight.group, torch.float32)
        return add_before(node, DEQUANTIZE_GROUP, held, args_of(node)[1], empty, *rest)
    flat = hold_before(graph, node, f"{weight.name}_channel_scale", scales[:, 0].contiguous())
    return add_before(node, DEQUANTIZE_CHANNEL, held, flat, empty, 0, low, high, torch.int8)


def quantize_dynamically(graph: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer whose result stays in float: its kernel rounds each row of the input."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight.target not in (
        DEQUANTIZE_CHANNEL,
        DEQUANTIZE_GROUP,
    ):
        return
    if weight.target is DEQUANTIZE_CHANNEL:
        low, high = args_of(weight)[-3:-1]
        if low >= -8 and high <= 7:  # only the kernel that rounds rows takes them two to a byte,
            weight.args = (*weight.args[:-3], -8, 7, weight.args[-1])  # and on this grid
        elif _rescales_within(graph, node):
            return
    chosen = add_before(node, ops.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    scale, zero = (add_before(node, operator.getitem, chosen, n) for n in (0, 1))
    grid = (scale, zero, -128, 127, torch.int8)
    integers = add_before(node, ops.quantize_per_token.default, x, *grid)
    floats = add_before(node, ops.dequantize_per_token.default, integers, *grid, torch.float32)
    node.update_arg(0, floats)


def restore_weight(graph: fx.GraphModule, node: fx.Node) -> None:
    """A convolution's weight of 4 bits is held in bytes; one that cannot run on integers has a
    weight in float, rounded as it was."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_CHANNEL:
        return
    if len(shape_of(node)) > 4 or not _rescales_within(graph, node):
        integers, scale, zeros, *rest = args_of(weight)
        tensors = [tensor_of(graph, str(each.target)) for each in (integers, scale, zeros)]
        made = hold_before(
            graph, node, f"{integers.target}_restored", DEQUANTIZE_CHANNEL(*tensors, *rest)
        )
        node.replace_input_with(weight, made)
        graph.graph.erase_node(weight)
    else:  # the kernel takes bytes, whatever they hold
        weight.args = (*weight.args[:-3], -128, 127, weight.args[-1])


def _rescales_within(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether input and result are integers, and the product of scales is one XNNPACK takes."""
    x, weight = args_of(node)[:2]
    result = quantized_result(node)
    if not isinstance(x, fx.Node) or x.target is not DEQUANTIZE or result is None:
        return False
    scales = tensor_of(graph, str(args_of(weight)[1].target))  # (C,)
    return bool(args_of(x)[1] * float(scales.max()) < MOST_RESCALED * args_of(result)[1])


def quantized_result(node: fx.Node) -> fx.Node | None:
    """The quantize op behind an op, perhaps behind its activation; None where others read it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in FOLLOWERS:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and users[0].target is QUANTIZE else None


def share_scale(graph: fx.GraphModule, node: fx.Node) -> None:
    """What only moves takes over the scale of its result: XNNPACK moves bytes as they are."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not QUANTIZE:
        return
    grid = users[0].args[1:]

    def shared(part: fx.Node) -> fx.Node:
        if part.target is DEQUANTIZE and part.args[1:] == grid:
            return part
        if part.target is not DEQUANTIZE and node.target is not aten.cat.default:
            return part
        return add_before(node, DEQUANTIZE, add_before(node, QUANTIZE, part, *grid), *grid)

    moved = args_of(node)[0]
    node.update_arg(0, shared(moved) if isinstance(moved, fx.Node) else [*map(shared, moved)])


def leave_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """An op whose scales lie too far apart for XNNPACK runs in float, behind a product with 1."""
    inputs, result = node.all_input_nodes, quantized_result(node)
    if result is None or any(each.target is not DEQUANTIZE for each in inputs):
        return
    scales, scale = [args_of(each)[1] for each in inputs], args_of(result)[1]
    scales = [math.prod(scales)] if node.target is aten.mul.Tensor else scales
    if not all(LEAST_RATIO[node.target] <= each / scale < MOST_RESCALED for each in scales):
        node.replace_input_with(inputs[0], add_before(node, aten.mul.Tensor, inputs[0], 1.0))
