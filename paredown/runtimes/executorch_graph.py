"""A captured graph as XNNPACK takes it, without changing what it computes.

XNNPACK runs an op on integers only where the whole pattern is there: dequantize ops before it,
perhaps a ReLU behind it, then a quantize op. These rewrites make more of a graph fit.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph import grouped
from paredown.graph.decomposed import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, decompose
from paredown.graph.edit import fold_batch_norm, remove_state, set_buffer
from paredown.graph.grouped import PER_GROUP
from paredown.graph.model import Model
from paredown.graph.regions import FOLLOWERS, MOVERS, prepare
from paredown.graph.sites import CONVOLUTIONS, tensor_of
from paredown.types import UserError

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed
HIDDEN = torch.finfo(torch.float32).min / 2  # added to a score that attention must not see
UNBOUNDED = torch.finfo(torch.float32).max
DEQUANTIZE_GROUP = ops.dequantize_per_channel_group.default
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.matmul.default)
MOST_RESCALED = 256.0  # input scale times weight scale over output scale, in XNNPACK's kernels
# The least that input scale over output scale may be; of a product, both input scales multiplied.
LEAST_RATIO: dict[Any, float] = {
    **{aten.add.Tensor: 2.0**-10, aten.sub.Tensor: 2.0**-10},
    **{aten.mul.Tensor: 2.0**-16, aten.mean.dim: 2.0**-8},
}
Rewrite = Callable[[fx.GraphModule, fx.Node], None]


def shape_for_xnnpack(model: Model) -> Model:
    """A copy of the model, decomposed and in evaluation mode, that XNNPACK takes more of."""
    made = decompose(model)
    prepare(made)
    fold_batch_norm(made.graph)
    for targets, rewrite in REWRITES:
        for node in [node for node in made.graph.graph.nodes if node.target in targets]:
            rewrite(made.graph, node)
    made.graph.graph.eliminate_dead_code()
    made.graph.graph.lint()
    made.graph.recompile()
    return made


def _add(before: fx.Node, op: Any, *args: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        return before.graph.call_function(op, args)


def _replace(node: fx.Node, made: fx.Node) -> None:
    node.replace_all_uses_with(made)
    made.meta.setdefault("val", node.meta.get("val"))
    node.graph.erase_node(node)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _args(node: fx.Node) -> Any:
    """A node's arguments, whose types its op fixes."""
    return node.args


def _shape(node: Any) -> Any:
    """The shape that a node has on the example inputs."""
    return node.meta["val"].shape


def _buffer(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    set_buffer(graph, name, value)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)


# --- float ops -------------------------------------------------------------------------------


def _drop_unit_factor(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product with ones goes: what drop-path is in evaluation."""
    x, factor = node.args[:2]
    for kept, other in ((x, factor), (factor, x)):
        if isinstance(kept, fx.Node) and isinstance(other, fx.Node) and _constant(other) == 1.0:
            if _shape(kept) == _shape(node):
                _replace(node, kept)
                return _erase_unread(other)


def _erase_unread(node: fx.Node) -> None:
    """Erase an op that nothing reads, in place or not, and then what only it has read."""
    sources = node.all_input_nodes
    if not node.users and node.op == "call_function":
        node.graph.erase_node(node)
        for source in sources:
            _erase_unread(source)


def _constant(value: Any) -> float | None:
    """The number that fills a tensor, where it is one number known beforehand."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, fx.Node) or not value.args:
        return None
    if value.target in (aten.fill_.Scalar, aten.full_like.default, aten.full.default):
        return _constant(value.args[1])
    if value.target in (aten.zeros.default, aten.ones.default):
        return float(value.target is aten.ones.default)
    if value.target in (aten.clone.default, QUANTIZE, DEQUANTIZE):  # the grid holds its one value
        return _constant(value.args[0])
    if value.target in _SCALAR_OPS and len(value.args) == 2:
        a, b = (_constant(arg) for arg in value.args)
        return None if a is None or b is None else _SCALAR_OPS[value.target](a, b)
    return None


_SCALAR_OPS: dict[Any, Callable[[float, float], float]] = {
    aten.div.Tensor: operator.truediv,
    aten.div_.Tensor: operator.truediv,
    aten.add.Tensor: operator.add,
    aten.mul.Tensor: operator.mul,
}


def _spell_attention(graph: fx.GraphModule, node: fx.Node) -> None:
    """Two products and a softmax, without the guards for rows that may see nothing at all."""
    query, key, value = node.args[:3]
    mask = _argument(node, 3, "attn_mask", None)
    if node.kwargs.get("enable_gqa", False):
        return
    scale = node.kwargs.get("scale") or 1 / math.sqrt(_shape(query)[-1])
    scaled = _add(node, aten.mul.Tensor, query, scale)
    scores = _add(node, aten.matmul.default, scaled, _add(node, aten.transpose.int, key, -2, -1))
    if _argument(node, 5, "is_causal", False):
        lengths = [_add(node, aten.sym_size.int, each, -2) for each in (query, key)]
        hidden = _add(node, aten.full.default, lengths, HIDDEN)
        scores = _add(node, aten.add.Tensor, scores, _add(node, aten.triu.default, hidden, 1))
    elif isinstance(mask, fx.Node):
        scores = _add(node, aten.add.Tensor, scores, _addend(graph, node, mask))
    weights = _add(node, aten.softmax.int, scores, -1)
    _replace(node, _add(node, aten.matmul.default, weights, value))


def _addend(graph: fx.GraphModule, node: fx.Node, mask: fx.Node) -> fx.Node:
    """0 where a mask is true and very negative where it is false; float masks are that already."""
    if mask.meta["val"].dtype is not torch.bool:
        return mask
    if mask.op == "get_attr":
        hidden = tensor_of(graph, str(mask.target)).logical_not().float() * HIDDEN
        return _buffer(graph, node, f"{mask.target}_addend", hidden)
    seen = _add(node, aten.to.dtype, mask, torch.float32)
    return _add(node, aten.mul.Tensor, _add(node, aten.sub.Tensor, seen, 1.0), -HIDDEN)


def _pool_by_mean(graph: fx.GraphModule, node: fx.Node) -> None:
    if node.args[1] in ([1, 1], 1) and len(_shape(node)) == 4:
        _replace(node, _add(node, aten.mean.dim, node.args[0], [2, 3], True))


def _spell_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    """A norm of (B, C) or (B, C, L) is a product and a sum per channel.

    ExecuTorch would make it a convolution, and fails where two such read the same weights.
    """
    tensors, batch_statistics = node.args[1:5], node.args[5]
    unknown = batch_statistics or None in tensors[2:] or any(map(_is_computed, tensors))
    if len(_shape(node)) > 3 or unknown:
        return
    weight, bias, mean, variance = (
        None if each is None else tensor_of(graph, str(each.target)).detach()
        for each in _args(node)[1:5]
    )
    factor = (variance + _args(node)[7]).rsqrt() * (1.0 if weight is None else weight)  # (C,)
    addend = (0.0 if bias is None else bias) - mean * factor  # (C,)
    name = f"{_args(node)[3].target}_folded"
    shape = (-1, *[1] * (len(_shape(node)) - 2))
    held = [
        _buffer(graph, node, f"{name}_{part}", value.view(shape))
        for part, value in (("factor", factor), ("addend", addend))
    ]
    scaled = _add(node, aten.mul.Tensor, node.args[0], held[0])
    scaled.meta["val"] = node.meta["val"]
    _replace(node, _add(node, aten.add.Tensor, scaled, held[1]))


def _is_computed(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr"


# --- integer ops -----------------------------------------------------------------------------


def _look_up_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """A lookup picks integers, and then multiplies the picked rows alone by their scales."""
    source, places = _args(node)[:2]
    if source.target is not PER_GROUP:
        return
    held, scale, zero, axis, group, low, high = _args(source)
    name = str(held.target)
    weight, scales = (tensor_of(graph, str(each.target)).detach() for each in (held, scale))
    zeros = None if zero is None else tensor_of(graph, str(zero.target))
    grid = (axis, group, low, high)

    def picked(part: str, values: Tensor) -> fx.Node:
        table = _buffer(graph, node, f"{name}_{part}", values)
        return _add(node, aten.embedding.default, table, places)

    rows = picked("table", grouped.integers(weight, scales, zeros, *grid).to(torch.int8))
    made = _add(node, aten.to.dtype, rows, torch.float32)
    if group:  # (..., F) -> (..., G, B)
        made = _add(node, aten.unflatten.int, made, -1, [scales.shape[1], group])
    for op, values in ((aten.sub.Tensor, zeros), (aten.mul.Tensor, scales)):
        if values is not None:
            part = picked("zeros" if values is zeros else "scales", values.float())
            part = _add(node, aten.unsqueeze.default, part, -1) if group else part
            made = _add(node, op, made, part)
    _replace(node, _add(node, aten.flatten.using_ints, made, -2, -1) if group else made)
    if not source.users:
        graph.graph.erase_node(source)
        remove_state(graph, name)


def _drop_clamp(graph: fx.GraphModule, node: fx.Node) -> None:
    """A ReLU goes where the quantize op behind it clips at the same levels; else it fuses."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not QUANTIZE:
        return
    scale, zero, low, high = _args(users[0])[1:5]
    bottom, top = _bounds(node)
    if round(bottom / scale) + zero <= low and round(top / scale) + zero >= high:
        _replace(node, _args(node)[0])
    elif node.target is aten.clamp.default:
        _replace(node, _add(node, aten.hardtanh.default, node.args[0], bottom, top))


def _bounds(node: fx.Node) -> tuple[float, float]:
    if node.target in (aten.relu.default, aten.relu6.default):
        return 0.0, 6.0 if node.target is aten.relu6.default else UNBOUNDED
    tanh = node.target is aten.hardtanh.default
    low = _argument(node, 1, "min_val" if tanh else "min", -1.0 if tanh else None)
    high = _argument(node, 2, "max_val" if tanh else "max", 1.0 if tanh else None)
    return -UNBOUNDED if low is None else low, UNBOUNDED if high is None else high


def _turn_product(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product with an integer weight (in, out) becomes a linear layer with one of (out, in)."""
    bias, x, weight = node.args if len(node.args) == 3 else (None, *_args(node))
    if not isinstance(weight, fx.Node) or node.kwargs:
        return
    if weight.target not in (DEQUANTIZE_CHANNEL, PER_GROUP) or weight.args[3] != 1:
        return
    source, scale, zeros, axis, *rest = _args(weight)
    turned = tensor_of(graph, str(source.target)).t().contiguous()  # (out, in)
    held = _buffer(graph, node, f"{source.target}_turned", turned)
    made = _add(node, weight.target, held, scale, zeros, 1 - axis, *rest)
    _replace(node, _add(node, aten.linear.default, x, made, bias))
    if not weight.users:
        graph.graph.erase_node(weight)
        remove_state(graph, str(source.target))


def _hold_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """Weights that are rounded alone: as integers where a linear layer reads them, whose kernel
    rounds each row of the input; rounded floats for other layers, which have no such kernel."""
    source, scale, zero, axis, group, low, high = _args(node)
    name = str(source.target)
    weight, scales = (tensor_of(graph, str(each.target)).detach() for each in (source, scale))
    zeros = None if zero is None else tensor_of(graph, str(zero.target))
    linear = axis == 0 and all(
        user.target is aten.linear.default and user.args[1] is node for user in node.users
    )
    bits = (high - low).bit_length()
    odd = group and (bits != 4 or group % 32 or weight.shape[1] % group)
    if linear and (zeros is not None or odd):
        raise UserError(
            f"model: {name!r} has weights of {bits} bits in groups of {group or weight.shape[1]}"
            f"{'' if zeros is None else ' with zero points'}. XNNPACK takes 8 bits with a scale "
            "for each channel, and 4 bits in groups of a multiple of 32 that divide a row, both "
            "without zero points: QuantizeWeights(4, group=32, zero_point=False)."
        )
    grid = (axis, group, low, high)
    if not linear:
        made = _buffer(graph, node, f"{name}_rounded", PER_GROUP(weight, scales, zeros, *grid))
    else:
        integers = grouped.integers(weight, scales, zeros, *grid).to(torch.int8)
        held = _buffer(graph, node, f"{name}_quantized", integers)
        none = torch.zeros(scales.shape if group else scales.shape[:1], dtype=torch.int64)
        empty = _buffer(graph, node, f"{name}_zero", none)
        if group:
            rest = (low, high, torch.int8, group, torch.float32)
            made = _add(node, DEQUANTIZE_GROUP, held, scale, empty, *rest)
        else:
            flat = _buffer(graph, node, f"{name}_channel_scale", scales[:, 0].contiguous())
            made = _add(node, DEQUANTIZE_CHANNEL, held, flat, empty, 0, low, high, torch.int8)
    _replace(node, made)
    remove_state(graph, name)


def _quantize_dynamically(graph: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer whose result stays in float: its kernel rounds each row of the input."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight.target not in (
        DEQUANTIZE_CHANNEL,
        DEQUANTIZE_GROUP,
    ):
        return
    if weight.target is DEQUANTIZE_CHANNEL:
        low, high = _args(weight)[-3:-1]
        if low >= -8 and high <= 7:  # only the kernel that rounds rows takes them two to a byte,
            weight.args = (*weight.args[:-3], -8, 7, weight.args[-1])  # and on this grid
        elif _rescales_within(graph, node):
            return
    chosen = _add(node, ops.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    scale, zero = (_add(node, operator.getitem, chosen, n) for n in (0, 1))
    grid = (scale, zero, -128, 127, torch.int8)
    integers = _add(node, ops.quantize_per_token.default, x, *grid)
    floats = _add(node, ops.dequantize_per_token.default, integers, *grid, torch.float32)
    node.update_arg(0, floats)


def _restore_weight(graph: fx.GraphModule, node: fx.Node) -> None:
    """A convolution that cannot run on integers has a weight in float, rounded as it was."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_CHANNEL:
        return
    if len(_shape(node)) > 4 or not _rescales_within(graph, node):
        integers, scale, zeros, *rest = _args(weight)
        tensors = [tensor_of(graph, str(each.target)) for each in (integers, scale, zeros)]
        made = _buffer(
            graph, node, f"{integers.target}_restored", DEQUANTIZE_CHANNEL(*tensors, *rest)
        )
        node.replace_input_with(weight, made)
        graph.graph.erase_node(weight)


def _rescales_within(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether input and result are integers, and the product of scales is one XNNPACK takes."""
    x, weight = _args(node)[:2]
    result = _quantized_result(node)
    if not isinstance(x, fx.Node) or x.target is not DEQUANTIZE or result is None:
        return False
    scales = tensor_of(graph, str(_args(weight)[1].target))  # (C,)
    return bool(_args(x)[1] * float(scales.max()) < MOST_RESCALED * _args(result)[1])


def _quantized_result(node: fx.Node) -> fx.Node | None:
    """The quantize op behind an op, perhaps behind its activation; None where others read it."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in FOLLOWERS:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and users[0].target is QUANTIZE else None


def _share_scale(graph: fx.GraphModule, node: fx.Node) -> None:
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
        return _add(node, DEQUANTIZE, _add(node, QUANTIZE, part, *grid), *grid)

    moved = _args(node)[0]
    node.update_arg(0, shared(moved) if isinstance(moved, fx.Node) else [*map(shared, moved)])


def _leave_integers(graph: fx.GraphModule, node: fx.Node) -> None:
    """An op whose scales lie too far apart for XNNPACK runs in float, behind a product with 1."""
    inputs, result = node.all_input_nodes, _quantized_result(node)
    if result is None or any(each.target is not DEQUANTIZE for each in inputs):
        return
    scales, scale = [_args(each)[1] for each in inputs], _args(result)[1]
    scales = [math.prod(scales)] if node.target is aten.mul.Tensor else scales
    if not all(LEAST_RATIO[node.target] <= each / scale < MOST_RESCALED for each in scales):
        node.replace_input_with(inputs[0], _add(node, aten.mul.Tensor, inputs[0], 1.0))


REWRITES: list[tuple[tuple[Any, ...], Rewrite]] = [
    ((aten.mul.Tensor,), _drop_unit_factor),
    ((aten.scaled_dot_product_attention.default,), _spell_attention),
    ((aten.adaptive_avg_pool2d.default,), _pool_by_mean),
    ((aten.batch_norm.default,), _spell_batch_norm),
    ((aten.embedding.default,), _look_up_integers),
    (tuple(FOLLOWERS), _drop_clamp),
    (PRODUCTS, _turn_product),
    ((PER_GROUP,), _hold_integers),
    ((aten.linear.default,), _quantize_dynamically),
    (CONVOLUTIONS, _restore_weight),
    ((aten.cat.default, *MOVERS), _share_scale),
    (tuple(LEAST_RATIO), _leave_integers),
]
