"""How factors of channels pass through an op: what `scaling` walks by.

An op that no rule covers pins what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from paredown.graph.coupling.labels import shape_of
from paredown.graph.ops import arguments, number
from paredown.graph.quantized.regions import MOVERS
from paredown.graph.sites import Site
from paredown.graph.state import getattr_or_none, tensor_of

if TYPE_CHECKING:
    from paredown.graph.coupling.scale_walk import Walk


aten = torch.ops.aten

# f(c x) = c f(x) for c > 0, value by value
_UNARY = {
    *(aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default),
    *(aten.abs.default, aten.neg.default, aten.dropout.default, aten.dropout_.default),
    *(aten.feature_dropout.default, aten.clone.default, aten.contiguous.default),
    *(aten.alias.default, aten.detach.default, aten.to.dtype, aten.prelu.default),
}
# The same over windows of the axes behind the channels
_WINDOWS = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default),
    *(aten.adaptive_avg_pool3d.default, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec),
    *(aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec, aten.upsample_bicubic2d.vec),
}
_SHAPERS = (MOVERS - _UNARY - _WINDOWS) | {
    *(aten.t.default, aten.repeat.default, aten.unbind.int, aten.flip.default, aten.roll.default),
    *(aten.repeat_interleave.self_int, aten.expand_as.default, aten.view_as.default),
    *(aten.reshape_as.default, aten.stack.default, aten.cat.default),
}
_SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor}
_PRODUCTS = {aten.mul.Tensor}
_LAST = {aten.layer_norm.default, aten.rms_norm.default}  # norms whose weight is the last axes'
_NORMS = _LAST | {aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default}

Labelled = Tensor | list[Any] | tuple[Any, ...] | None


def visit(walk: Walk, node: fx.Node) -> Labelled:
    """The labels of a node's value; what reads a value in any other way than a rule's pins it."""
    if node.op == "get_attr":
        return _parameter(walk, node)
    if node.op == "call_function":
        if node in walk.sites:
            return _layer(walk, node, walk.sites[node][0])
        for kinds, rule in _RULES:
            if node.target in kinds:
                return rule(walk, node)
    return _unknown(walk, node)


def _unknown(walk: Walk, node: fx.Node) -> Labelled:
    for each in node.all_input_nodes:
        walk.pin(each)
    return None


def _parameter(walk: Walk, node: fx.Node) -> Tensor | None:
    """A trained tensor that takes part in plain arithmetic; weights of layers have other rules."""
    found = getattr_or_none(walk.graph, str(node.target))
    plain = _SUMS | _PRODUCTS | _SHAPERS
    trained = isinstance(found, nn.Parameter) and found.is_floating_point()
    if not trained or found.numel() == 1 or any(user.target not in plain for user in node.users):
        return None
    if not walk.alone(str(node.target)):
        return None
    made = walk.fresh(found.shape)
    walk.make(str(node.target), made)
    return made


def _unary(walk: Walk, node: fx.Node) -> Labelled:
    if not node.meta["val"].is_floating_point():  # a cast to whole numbers
        return _unknown(walk, node)
    for other in node.all_input_nodes[1:]:
        walk.pin(other)
    return walk.values[node.all_input_nodes[0]]  # type: ignore[no-any-return]


def _windows(walk: Walk, node: fx.Node) -> Labelled:
    value, shape = walk.values[node.all_input_nodes[0]], shape_of(node.meta["val"])
    kept = None
    if value is not None and value.dim() == len(shape) > 2:
        kept = walk.along(value, [0, 1])
    if kept is None:
        return _unknown(walk, node)
    return kept.reshape(*kept.shape, *[1] * (len(shape) - 2)).expand(shape)


def _mean(walk: Walk, node: fx.Node) -> Labelled:
    named = arguments(node)
    value, shape = walk.values[named["self"]], shape_of(node.meta["val"])
    if value is None or not named["dim"]:
        return _unknown(walk, node)
    gone = {axis % value.dim() for axis in named["dim"]}
    kept = walk.along(value, set(range(value.dim())) - gone)
    return _unknown(walk, node) if kept is None else kept.reshape(shape)


def _shaper(walk: Walk, node: fx.Node) -> Labelled:
    """The op itself, run on the labels."""
    if all(walk.values[each] is None for each in node.all_input_nodes):
        return None

    def labels_of(each: fx.Node) -> Any:
        value = each.meta.get("val")
        if walk.values[each] is not None:
            return walk.values[each]
        if isinstance(value, Tensor):
            return torch.zeros((), dtype=torch.int64).expand(shape_of(value))
        return number(each)

    target: Any = node.target
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), labels_of)
    try:
        return target(*args, **kwargs)  # type: ignore[no-any-return]
    except (RuntimeError, TypeError):  # not for whole numbers, or several of them pinned
        return _unknown(walk, node)


def _sums(walk: Walk, node: fx.Node) -> Labelled:
    first, second = (walk.values.get(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
    if first is None or second is None:
        return _unknown(walk, node)
    return walk.tie(first, second)


def _products(walk: Walk, node: fx.Node) -> Labelled:
    """The factors of one operand pass; the other must stay as it is."""
    operands: Any = node.args[:2]
    values = [walk.values.get(a) if isinstance(a, fx.Node) else None for a in operands]
    free = [n for n in range(2) if walk.free(values[n])]
    if not free:
        return None
    chosen = free[0] if len(free) == 1 else _carrier(operands)
    if isinstance(operands[1 - chosen], fx.Node):
        walk.pin(operands[1 - chosen])
    kept = values[chosen]
    assert kept is not None
    return kept.expand(shape_of(node.meta["val"]))


def _carrier(operands: Any) -> int:
    """A parameter takes factors up, so that what it multiplies need not; else the larger does."""
    trained = [n for n in range(2) if operands[n].op == "get_attr"]
    sizes = [operand.meta["val"].numel() for operand in operands]
    return trained[0] if trained else int(sizes[1] > sizes[0])


def _quotient(walk: Walk, node: fx.Node) -> Labelled:
    whole, by = node.args[:2]
    if isinstance(by, fx.Node):
        walk.pin(by)
    value = walk.values[whole] if isinstance(whole, fx.Node) else None
    return None if value is None else value.expand(shape_of(node.meta["val"]))


def _norm(walk: Walk, node: fx.Node) -> Labelled:
    """What a norm puts out has the size of its own weight and bias, whatever comes in."""
    named, shape = arguments(node), shape_of(node.meta["val"])
    _unknown(walk, node)
    held = [named.get("weight"), named.get("bias")]
    names = [str(each.target) if isinstance(each, fx.Node) else None for each in held]
    if names[0] is None or named.get("training") or not all(map(walk.alone, names)):
        return None
    if any(isinstance(each, fx.Node) and each.op != "get_attr" for each in held):
        return None
    made = walk.fresh(tensor_of(walk.graph, names[0]).shape)
    for name in names:
        if name is not None:
            walk.make(name, made)
    if node.target not in _LAST:
        made = made.reshape(-1, *[1] * (len(shape) - 2))
    return made.expand(shape)


def _attention(walk: Walk, node: fx.Node) -> Labelled:
    """A mean of values over their places keeps the factors of their channels."""
    value = arguments(node)["value"]
    for each in node.all_input_nodes:
        if each is not value:
            walk.pin(each)
    return _over_places(walk, node, value)


def _mixture(walk: Walk, node: fx.Node) -> Labelled:
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    walk.pin(first)
    return _over_places(walk, node, second)


def _over_places(walk: Walk, node: fx.Node, source: fx.Node) -> Labelled:
    """(..., S, C) mixed along S into (..., T, C)."""
    value, shape, kept = walk.values[source], shape_of(node.meta["val"]), None
    if value is not None and value.dim() > 2 and value.shape[:-2] == shape[:-2]:
        kept = walk.along(value, set(range(value.dim())) - {value.dim() - 2})
    if kept is None:
        walk.pin(source)
        return None
    return kept.unsqueeze(-2).expand(shape)


def _layer(walk: Walk, node: fx.Node, site: Site) -> Labelled:
    """A layer reads its input's factors and makes its own."""
    weight = tensor_of(walk.graph, site.weight)
    direct = any(each.target == site.weight for each in node.all_input_nodes)  # not quantized
    if not direct or not _is_plain(node, site, weight) or not walk.alone(site.weight):
        return _unknown(walk, node)
    shape = shape_of(node.meta["val"])
    if site.kind != "embedding":
        _read(walk, site, weight)
    if not walk.alone(site.bias):
        return None
    axis = 1 if site.kind == "embedding" else site.axis
    made = walk.fresh([weight.shape[axis]])
    walk.make(site.weight, _on_axis(made, axis, weight.dim()))
    if site.bias is not None:
        walk.make(site.bias, made)
    channels_first = site.kind in ("conv", "conv_transpose") and len(shape) == weight.dim()
    return _on_axis(
        made, len(shape) - weight.dim() + 1 if channels_first else -1, len(shape)
    ).expand(shape)


def _is_plain(node: fx.Node, site: Site, weight: Tensor) -> bool:
    named = arguments(node) if site.kind != "recurrent" else {}
    if site.kind == "matmul":
        return weight.dim() == 2 and named.get("beta", 1) == named.get("alpha", 1) == 1
    if site.kind == "conv_transpose":
        return bool(named["groups"] == 1)
    if site.kind == "embedding":
        return not named.get("sparse")
    return site.kind in ("conv", "linear")


def _read(walk: Walk, site: Site, weight: Tensor) -> None:
    """The factors of the input's channels go into the weight, where they are the channels' own."""
    value = walk.values[site.input]
    if value is None:
        return
    images = site.kind in ("conv", "conv_transpose")
    axis = 1 if images and value.dim() == weight.dim() else 0 if images else value.dim() - 1
    channels = walk.along(value, [axis])
    if channels is None:
        walk.pin(site.input)
        return
    groups = len(channels) // weight.shape[1] if site.kind == "conv" else 1
    if groups == 1:
        inner = 1 - site.axis
        walk.read(site, channels, _on_axis(channels, inner, weight.dim()))
        return
    each = channels.reshape(groups, 1, -1)  # (groups, 1, I / groups)
    rows = each.expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
    walk.read(site, channels, rows.reshape(*rows.shape, *[1] * (weight.dim() - 2)))


def _on_axis(labels: Tensor, axis: int, rank: int) -> Tensor:
    """Labels (n,) as an array of that rank, varying along ``axis``."""
    shape = [1] * rank
    shape[axis] = -1
    return labels.reshape(shape)


_RULES: tuple[tuple[set[Any], Callable[[Walk, fx.Node], Labelled]], ...] = (
    (_UNARY, _unary),
    (_WINDOWS, _windows),
    ({aten.mean.dim, aten.sum.dim_IntList}, _mean),
    (_SHAPERS, _shaper),
    (_SUMS, _sums),
    (_PRODUCTS, _products),
    ({aten.div.Tensor}, _quotient),
    (_NORMS, _norm),
    ({aten.scaled_dot_product_attention.default}, _attention),
    ({aten.matmul.default, aten.bmm.default}, _mixture),
)
