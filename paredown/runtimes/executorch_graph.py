"""A captured graph as XNNPACK takes it, and without changing what it computes.

XNNPACK runs an op on integers only where its whole pattern is there: dequantize ops on all inputs,
perhaps a ReLU behind it, then a quantize op. These rewrites make more of a graph fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib as _ops  # noqa: F401

from paredown.graph.decomposed import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNEL,
    QUANTIZE,
    decompose,
)
from paredown.graph.edit import keep_meta, refresh_values, remove_state, set_buffer
from paredown.graph.model import Model
from paredown.graph.regions import FOLLOWERS, prepare
from paredown.graph.sites import tensor_of

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
MASKED = torch.finfo(torch.float32).min / 2  # added to what attention must not see
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.matmul.default)


def shape_for_xnnpack(model: Model) -> Model:
    """A copy of the model, quantizers decomposed, of which XNNPACK takes as much as it can."""
    made = decompose(model)
    prepare(made)
    for target, rewrite in REWRITES:
        for node in list(made.graph.graph.nodes):
            if node.target in target:
                rewrite(made.graph, node)
    made.graph.graph.eliminate_dead_code()
    made.graph.graph.lint()
    made.graph.recompile()
    return made


def _add(before: fx.Node, op: Any, *args: Any) -> fx.Node:
    with before.graph.inserting_before(before):
        made = before.graph.call_function(op, args)
    keep_meta(made, before)
    return made


def _replace(node: fx.Node, made: fx.Node) -> None:
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# --- float ops -------------------------------------------------------------------------------


def _spell_attention(graph: fx.GraphModule, node: fx.Node) -> None:
    """Two products and a softmax, without the guards against rows that see nothing at all."""
    query, key, value = node.args[:3]
    mask = _argument(node, 3, "attn_mask", None)
    causal = _argument(node, 5, "is_causal", False)
    if causal or node.kwargs.get("enable_gqa", False):
        return
    width = query.meta["val"].shape[-1]  # type: ignore[union-attr]
    scale = node.kwargs.get("scale") or 1 / math.sqrt(width)
    scaled = _add(node, aten.mul.Tensor, query, scale)
    turned = _add(node, aten.transpose.int, key, -2, -1)
    scores = _add(node, aten.matmul.default, scaled, turned)
    if isinstance(mask, fx.Node):
        scores = _add(node, aten.add.Tensor, scores, _as_addend(node, mask))
    weights = _add(node, aten.softmax.int, scores, -1)
    _replace(node, _add(node, aten.matmul.default, weights, value))


def _as_addend(node: fx.Node, mask: fx.Node) -> fx.Node:
    """0 where a mask is true and very negative where it is false; float masks are that already."""
    if mask.meta["val"].dtype is not torch.bool:
        return mask
    seen = _add(node, aten.to.dtype, mask, torch.float32)
    return _add(node, aten.mul.Tensor, _add(node, aten.sub.Tensor, seen, 1.0), -MASKED)


def _pool_by_mean(graph: fx.GraphModule, node: fx.Node) -> None:
    if node.args[1] in ([1, 1], 1) and node.args[0].meta["val"].dim() == 4:  # type: ignore[union-attr]
        _replace(node, _add(node, aten.mean.dim, node.args[0], [2, 3], True))


def _multiply_by_tensor(graph: fx.GraphModule, node: fx.Node) -> None:
    node.target = aten.mul.Tensor


# --- integer ops -----------------------------------------------------------------------------


def _drop_clamp(graph: fx.GraphModule, node: fx.Node) -> None:
    """A ReLU goes where the quantize op behind it clips at the same levels; else it fuses."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not QUANTIZE:
        return
    _, scale, zero, low, high, _ = users[0].args
    bottom, top = _bounds(node)
    if round(bottom / scale) + zero <= low and round(top / scale) + zero >= high:  # type: ignore[operator]
        _replace(node, node.args[0])  # type: ignore[arg-type]
    elif node.target is aten.clamp.default:
        limit = torch.finfo(torch.float32).max
        _replace(node, _add(node, aten.hardtanh.default, node.args[0], max(bottom, -limit), min(top, limit)))


def _bounds(node: fx.Node) -> tuple[float, float]:
    if node.target is aten.relu.default:
        return 0.0, 1e38
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    default = (-1.0, 1.0) if node.target is aten.hardtanh.default else (None, None)
    names = ("min_val", "max_val") if node.target is aten.hardtanh.default else ("min", "max")
    low, high = (_argument(node, n + 1, names[n], default[n]) for n in (0, 1))
    return -1e38 if low is None else low, 1e38 if high is None else high


def _turn_product(graph: fx.GraphModule, node: fx.Node) -> None:
    """A product with an integer weight (in, out) is a linear layer with a weight (out, in)."""
    bias, x, weight = node.args if len(node.args) == 3 else (None, *node.args)
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_CHANNEL or node.kwargs:
        return
    source, scale, zeros, axis, *rest = weight.args
    name = f"{source.target}_turned"  # type: ignore[union-attr]
    set_buffer(graph, name, tensor_of(graph, str(source.target)).t().contiguous())  # type: ignore[union-attr]
    with graph.graph.inserting_before(node):
        held = graph.graph.get_attr(name)
    turned = _add(node, DEQUANTIZE_CHANNEL, held, scale, zeros, 1 - axis, *rest)  # type: ignore[operator]
    _replace(node, _add(node, aten.linear.default, x, turned, bias))
    if not weight.users:
        graph.graph.erase_node(weight)
        remove_state(graph, str(source.target))  # type: ignore[union-attr]


def _quantize_dynamically(graph: fx.GraphModule, node: fx.Node) -> None:
    """A linear layer whose result stays in float: its kernel rounds each row of the input anew."""
    x, weight = node.args[:2]
    if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE_CHANNEL:
        return
    result = node
    users = list(result.users)
    if len(users) == 1 and users[0].target in FOLLOWERS:
        result = users[0]
    if len(result.users) == 1 and next(iter(result.users)).target is QUANTIZE and x.target is DEQUANTIZE:
        return
    chosen = _add(node, quantized.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    with graph.graph.inserting_before(node):
        scale, zero = (graph.graph.call_function(__import__("operator").getitem, (chosen, n)) for n in (0, 1))
    grid = (scale, zero, -128, 127, torch.int8)
    rounded = _add(node, quantized.quantize_per_token.default, x, *grid)
    restored = _add(node, quantized.dequantize_per_token.default, rounded, *grid, torch.float32)
    node.update_arg(0, restored)


def _share_scale(graph: fx.GraphModule, node: fx.Node) -> None:
    """What is joined takes over the scale of the result: integers are then moved alone."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not QUANTIZE:
        return
    grid = users[0].args[1:]
    parts = []
    for part in node.args[0]:  # type: ignore[union-attr]
        if part.target is not DEQUANTIZE or part.args[1:] != grid:
            part = _add(node, DEQUANTIZE, _add(node, QUANTIZE, part, *grid), *grid)
        parts.append(part)
    node.update_arg(0, parts)


REWRITES: list[tuple[tuple[Any, ...], Callable[[fx.GraphModule, fx.Node], None]]] = [
    ((aten.scaled_dot_product_attention.default,), _spell_attention),
    ((aten.adaptive_avg_pool2d.default,), _pool_by_mean),
    ((aten.mul.Scalar,), _multiply_by_tensor),
    (tuple(FOLLOWERS), _drop_clamp),
    (PRODUCTS, _turn_product),
    ((aten.linear.default,), _quantize_dynamically),
    ((aten.cat.default,), _share_scale),
]
