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
from torch import fx

from paredown.graph.computed import fold_computed_weights
from paredown.graph.fold import fold_batch_norm
from paredown.graph.model import Model
from paredown.graph.ops import argument
from paredown.graph.quantized.decomposed import DEQUANTIZE, QUANTIZE, decompose
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.regions import FOLLOWERS, MOVERS, prepare
from paredown.graph.sites import CONVOLUTIONS, readers
from paredown.graph.state import tensor_of
from paredown.targets.formats.executorch.integers import (
    LEAST_RATIO,
    PRODUCTS,
    drop_clamp,
    hold_integers,
    leave_integers,
    quantize_dynamically,
    restore_weight,
    share_scale,
    turn_product,
)
from paredown.targets.formats.executorch.recurrent import unroll
from paredown.targets.formats.rowwise import (
    add_before,
    args_of,
    hold_before,
    look_up_integers,
    replace_by,
    shape_of,
)

aten = torch.ops.aten
ops = torch.ops.quantized_decomposed
HIDDEN = torch.finfo(torch.float32).min / 2  # added to a score that attention must not see
ADAPTIVE: dict[Any, int] = {  # adaptive maximum -> dimensions that it pools
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
POOLS_OF_BLOCKS: dict[Any, Any] = {
    aten.avg_pool3d.default: aten.avg_pool2d.default,
    aten.max_pool3d.default: aten.max_pool2d.default,
}
Rewrite = Callable[[fx.GraphModule, fx.Node], None]


def shape_for_xnnpack(model: Model) -> Model:
    """A copy of the model, decomposed and in evaluation mode, that XNNPACK takes more of."""
    made = decompose(model)
    fold_computed_weights(made)
    prepare(made)
    unroll(made)
    _part_shared_layers(made.graph)
    fold_batch_norm(made.graph)
    fixed = all(set(item.dynamic) <= {0} for item in made.inputs)
    for targets, rewrite in [*REWRITES, *(OF_FIXED_SIZES if fixed else ())]:
        for node in [node for node in made.graph.graph.nodes if node.target in targets]:
            rewrite(made.graph, node)
    made.graph.graph.eliminate_dead_code()
    made.graph.graph.lint()
    made.graph.recompile()
    return made


def _part_shared_layers(graph: fx.GraphModule) -> None:
    """A layer before a batch norm has weight and bias of its own, for the norm to be folded into.

    ExecuTorch folds norms too, and gives what it makes for two that follow one weight one name.
    """
    read = readers(graph)
    for node in [n for n in graph.graph.nodes if n.target in (*CONVOLUTIONS, aten.linear.default)]:
        (user,) = node.users if len(node.users) == 1 else (node,)
        if user.target is not aten.batch_norm.default:
            continue
        for position, held in enumerate(node.args[1:3], 1):
            if isinstance(held, fx.Node) and held.op == "get_attr":
                tensor = tensor_of(graph, str(held.target))
                if len(read[id(tensor)]) > 1:
                    name = f"{held.target}_for_{node.name}"
                    node.update_arg(
                        position, hold_before(graph, node, name, tensor.detach().clone())
                    )


# --- float ops -------------------------------------------------------------------------------


def _drop_unit_factor(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product with ones goes: what drop-path is in evaluation."""
    x, factor = node.args[:2]
    for kept, other in ((x, factor), (factor, x)):
        if isinstance(kept, fx.Node) and isinstance(other, fx.Node) and _constant(other) == 1.0:
            if shape_of(kept) == shape_of(node):
                replace_by(node, kept)
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
    mask = argument(node, "attn_mask")
    if node.kwargs.get("enable_gqa", False):
        return
    scale = node.kwargs.get("scale") or 1 / math.sqrt(shape_of(query)[-1])
    scaled = add_before(node, aten.mul.Tensor, query, scale)
    scores = add_before(
        node, aten.matmul.default, scaled, add_before(node, aten.transpose.int, key, -2, -1)
    )
    if argument(node, "is_causal"):
        lengths = [add_before(node, aten.sym_size.int, each, -2) for each in (query, key)]
        hidden = add_before(node, aten.full.default, lengths, HIDDEN)
        scores = add_before(
            node, aten.add.Tensor, scores, add_before(node, aten.triu.default, hidden, 1)
        )
    elif isinstance(mask, fx.Node):
        scores = add_before(node, aten.add.Tensor, scores, _addend(graph, node, mask))
    weights = add_before(node, aten.softmax.int, scores, -1)
    replace_by(node, add_before(node, aten.matmul.default, weights, value))


def _addend(graph: fx.GraphModule, node: fx.Node, mask: fx.Node) -> fx.Node:
    """0 where a mask is true and very negative where it is false; float masks are that already."""
    if mask.meta["val"].dtype is not torch.bool:
        return mask
    if mask.op == "get_attr":
        hidden = tensor_of(graph, str(mask.target)).logical_not().float() * HIDDEN
        return hold_before(graph, node, f"{mask.target}_addend", hidden)
    seen = add_before(node, aten.to.dtype, mask, torch.float32)
    return add_before(node, aten.mul.Tensor, add_before(node, aten.sub.Tensor, seen, 1.0), -HIDDEN)


def _pool_by_mean(graph: fx.GraphModule, node: fx.Node) -> None:
    """An adaptive mean over all places."""
    source, sizes = args_of(node)
    count = 3 if node.target is aten.adaptive_avg_pool3d.default else 2
    if all(isinstance(size, int) and size == 1 for size in sizes):
        dims = [2, 3] if len(shape_of(node)) == 4 and count == 2 else list(range(-count, 0))
        replace_by(node, add_before(node, aten.mean.dim, source, dims, True))


def _pool_by_windows(graph: fx.GraphModule, node: fx.Node) -> None:
    """An adaptive mean over windows of one size."""
    source, sizes = args_of(node)
    sizes = sizes if len(sizes) == 2 else [*sizes] * 2
    places = shape_of(source)[-2:]
    if not any(n % size for n, size in zip(places, sizes, strict=True)):
        window = [n // size for n, size in zip(places, sizes, strict=True)]
        replace_by(node, add_before(node, aten.avg_pool2d.default, source, window, window))


def _pool_in_two(graph: fx.GraphModule, node: fx.Node) -> None:
    """A mean or maximum over blocks, which ExecuTorch lacks: over images, and then over depth."""
    x, kernel = args_of(node)[:2]
    op = POOLS_OF_BLOCKS[node.target]
    stride = argument(node, "stride") or kernel
    padding = argument(node, "padding")
    sizes, made = shape_of(x), shape_of(node)
    if op is aten.avg_pool2d.default:
        odd = any(padding) or any(args_of(node)[4:5]) or any(args_of(node)[6:7])
    else:
        odd = any(size != 1 for size in argument(node, "dilation")) or args_of(node)[5:6]
    if odd or not len(sizes) == 5 == len(padding) + 2:
        return
    if len(kernel) != 3 or not all(isinstance(size, int) for size in (*sizes[1:], *made[1:])):
        return
    channels, depth = sizes[1:3]
    flat = add_before(node, aten.reshape.default, x, [-1, channels * depth, *sizes[3:]])
    flat = add_before(node, op, flat, list(kernel[1:]), list(stride[1:]), list(padding[1:]))
    flat = add_before(node, aten.reshape.default, flat, [-1, channels, depth, made[3] * made[4]])
    flat = add_before(node, op, flat, [kernel[0], 1], [stride[0], 1], [padding[0], 0])
    replace_by(node, add_before(node, aten.reshape.default, flat, [-1, *made[1:]]))


def _pool_by_maximum(graph: fx.GraphModule, node: fx.Node) -> None:
    """An adaptive maximum over all places, which ExecuTorch lacks; where it lies, nobody asks."""
    source, sizes = args_of(node)
    picks = list(node.users)
    asked = any(args_of(pick)[1] == 1 and pick.users for pick in picks)
    if asked or any(size != 1 for size in (sizes if isinstance(sizes, list) else [sizes])):
        return
    places = list(range(-ADAPTIVE[node.target], 0))
    made = add_before(node, aten.amax.default, source, places, True)
    for pick in picks:
        replace_by(pick, made)
    graph.graph.erase_node(node)


def _spell_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    """A norm of (B, C) or (B, C, L) is a product and a sum per channel.

    ExecuTorch would make it a convolution, and fails where two such read the same weights.
    """
    tensors, batch_statistics = node.args[1:5], node.args[5]
    unknown = batch_statistics or None in tensors[2:] or any(map(_is_computed, tensors))
    if len(shape_of(node)) > 3 or unknown:
        return
    weight, bias, mean, variance = (
        None if each is None else tensor_of(graph, str(each.target)).detach()
        for each in args_of(node)[1:5]
    )
    factor = (variance + args_of(node)[7]).rsqrt() * (1.0 if weight is None else weight)  # (C,)
    addend = (0.0 if bias is None else bias) - mean * factor  # (C,)
    name = f"{args_of(node)[3].target}_folded"
    shape = (-1, *[1] * (len(shape_of(node)) - 2))
    held = [
        hold_before(graph, node, f"{name}_{part}", value.view(shape))
        for part, value in (("factor", factor), ("addend", addend))
    ]
    scaled = add_before(node, aten.mul.Tensor, node.args[0], held[0])
    scaled.meta["val"] = node.meta["val"]
    replace_by(node, add_before(node, aten.add.Tensor, scaled, held[1]))


def _is_computed(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr"


REWRITES: list[tuple[tuple[Any, ...], Rewrite]] = [
    ((aten.mul.Tensor,), _drop_unit_factor),
    ((aten.scaled_dot_product_attention.default,), _spell_attention),
    ((aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default), _pool_by_mean),
    (tuple(POOLS_OF_BLOCKS), _pool_in_two),
    (tuple(ADAPTIVE), _pool_by_maximum),
    ((aten.batch_norm.default,), _spell_batch_norm),
    ((aten.embedding.default,), look_up_integers),
    (tuple(FOLLOWERS), drop_clamp),
    (PRODUCTS, turn_product),
    ((PER_GROUP,), hold_integers),
    ((aten.linear.default,), quantize_dynamically),
    (CONVOLUTIONS, restore_weight),
    ((aten.cat.default, *MOVERS), share_scale),
    (tuple(LEAST_RATIO), leave_integers),
]
OF_FIXED_SIZES: list[tuple[tuple[Any, ...], Rewrite]] = [
    ((aten.adaptive_avg_pool2d.default,), _pool_by_windows),
]
