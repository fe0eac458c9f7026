"""Convolutions, embeddings, and what stands between a weight and its op."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk
from paredown.graph.coupling.rules.common import out_shape
from paredown.graph.ops import arguments, number, set_argument

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


Linked = tuple["np.ndarray | None", "np.ndarray | None", "np.ndarray | None"]


def embedding(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    weight = walk.pin_axes(walk.value(named["weight"]), [0])
    walk.pin_all([walk.value(named["indices"])])
    labels = walk.axis(weight, 1)
    shape = out_shape(node)
    blocks = [] if labels is None else [Block((len(shape) - 1,), labels)]
    return walk.made(shape, blocks)


def convolution(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    transposed = is_transposed(node)
    x, weight = walk.value(named["input"]), walk.value(named["weight"])
    groups, rank = number(named.get("groups", 1)), len(weight.shape) - 2
    channels = len(x.shape) - rank - 1
    spatial = range(channels + 1, len(x.shape))
    x = walk.separate(x, avoid=spatial)
    if not _is_pointwise(named, weight):
        x = walk.pin_axes(x, spatial)
    weight = walk.separate(weight)
    weight = walk.pin_axes(weight, range(2, len(weight.shape)))
    shape = out_shape(node)
    ins, one, two = walk.axis(x, channels), walk.axis(weight, 0), walk.axis(weight, 1)
    link = _transposed if transposed else _forward
    widths = (x.shape[channels], shape[channels])
    whole = isinstance(named.get("groups", 1), int) and whole_groups(walk, groups, ins, widths)
    outs, one, two = link(walk, groups, ins, one, two, (widths[1], whole))
    images = math.prod(shape[:channels]) * math.prod(weight.shape[2:])
    places = [(x if transposed else Value(shape)).shape[a] for a in spatial]
    cuttable = [walk.axis(x, a) for a in spatial]
    walk.count(images, one, two, *cuttable, sizes=[*weight.shape[:2], *places])
    blocks = [b for b in x.blocks if b.axes != (channels,)]
    blocks += [] if outs is None else [Block((channels,), outs)]
    return _channel_bias(walk, Value(shape, tuple(blocks)), named["bias"], channels)


def is_transposed(node: fx.Node) -> bool:
    return "transpose" in str(node.target) or bool(arguments(node).get("transposed", False))


def _is_pointwise(named: dict[str, Any], weight: Value) -> bool:
    """A kernel of size 1 at every place: it does not mix places, even where they are labelled."""
    moves = [named.get(name, default) for name, default in (("stride", 1), ("padding", 0))]
    still = all(
        m in (default, "valid") or (isinstance(m, (list, tuple)) and set(m) == {default})
        for m, default in zip(moves, (1, 0), strict=True)
    )
    return still and all(size == 1 for size in weight.shape[2:])


def _forward(walk: Walk, groups: int, ins: Any, one: Any, two: Any, outer: Any) -> Linked:
    """Weight (out, in / groups, ...): labels of the output, and of the weight's two axes."""
    if groups == 1:
        ins = walk.tie(ins, two)
        return one, one, ins
    if outer[1]:
        _by_group(walk, groups, ins, one)
        if two is not None:
            walk.pin(two)
        return one, one, None
    inside = _inside(walk, groups, ins)
    two = walk.tie(inside, two)
    _inside(walk, groups, one)
    return one, one, two


def _transposed(walk: Walk, groups: int, ins: Any, one: Any, two: Any, outer: Any) -> Linked:
    """Weight (in, out / groups, ...): labels of the output, and of the weight's two axes."""
    ins = walk.tie(ins, one)
    if groups == 1:
        return two, ins, two
    if outer[1]:
        outs = walk.labels.fresh(outer[0])
        _by_group(walk, groups, ins, outs)
        if two is not None:
            walk.pin(two)
        return outs, ins, None
    _inside(walk, groups, ins)
    return (None if two is None else np.tile(two, groups)), ins, two


def whole_groups(walk: Walk, groups: int, ins: Any, widths: tuple[int, int]) -> bool:
    """Whether groups go as a whole; else channels go from within each group alike.

    Whichever leaves more to choose from. Where the input is pinned nothing is left of groups.
    """
    if widths[0] == groups:
        return True
    free = ins is not None and bool(walk.labels.find(ins).all())
    return free and groups > min(widths[0] // groups, widths[1] // groups)


def _by_group(walk: Walk, groups: int, ins: np.ndarray | None, outs: np.ndarray | None) -> None:
    """The channels of a group, in and out, are cut together."""
    rows = [each.reshape(groups, -1) for each in (ins, outs) if each is not None]
    for each in rows:
        walk.labels.union(each, each[:, :1])
    walk.tie(*[None if each is None else each.reshape(groups, -1)[:, 0] for each in (ins, outs)])
    if len(rows) == 1:  # one side is pinned
        walk.pin(rows[0])


def _inside(walk: Walk, groups: int, labels: np.ndarray | None) -> np.ndarray | None:
    """The same places of every group are cut together."""
    return None if labels is None else walk.merge(labels.reshape(groups, -1), 1)


def rewrite_convolution(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    groups = named.get("groups", 1)
    if groups == 1 or not isinstance(groups, int):  # as many as the batch has examples: stays so
        return
    weight, x = cut.value(named["weight"]), cut.value(named["input"])
    channels = len(x.shape) - len(weight.shape) + 1
    whole = node if is_transposed(node) else named["input"]  # whose channels the groups share out
    if cut.count(whole, channels) is None and cut.count(named["weight"], 1) is None:
        return
    set_argument(node, "groups", cut.size(whole, channels) // cut.size(named["weight"], 1))


def _channel_bias(walk: Walk, made: Value, bias: Any, axis: int) -> Value:
    if bias is None:
        return walk.made(made.shape, made.blocks)
    labels = walk.tie(walk.axis(made, axis), walk.axis(walk.value(bias), 0))
    others = [b for b in made.blocks if b.axes != (axis,)]
    return walk.made(made.shape, [*others, *([] if labels is None else [Block((axis,), labels)])])


def weight_norm(walk: Walk, node: fx.Node) -> Result:
    """``v * g / |v|``, a norm for each index of ``dim``, where zeros would be 0 / 0."""
    named = arguments(node)
    direction, scale = walk.value(named["v"]), walk.value(named["g"])
    walk.never_zero.add((named["v"], named["dim"]))
    walk.tie(walk.axis(direction, named["dim"]), walk.axis(scale, named["dim"]))
    return walk.made(direction.shape, direction.blocks, constant=True)


def quantize_channel(walk: Walk, node: fx.Node) -> Result:
    x, scale = walk.value(node.args[0]), walk.value(node.args[1])
    axis: Any = arguments(node)["axis"]
    walk.never_zero.add((node.args[1], 0))  # type: ignore[arg-type]
    x = walk.separate(x)
    labels = walk.tie(walk.axis(x, axis), walk.axis(scale, 0))
    blocks = [b for b in x.blocks if b.axes != (axis,)]
    return walk.made(
        x.shape, [*blocks, *([] if labels is None else [Block((axis,), labels)])], x.constant
    )
