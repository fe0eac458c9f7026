"""Norms and reductions: ops that see how many indices an axis has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Walk, shape_of
from paredown.graph.coupling.rules.common import combine, new_sizes, out_shape, reduced
from paredown.graph.ops import arguments, listed, set_argument

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


def channel_norm(walk: Walk, node: fx.Node) -> Result:
    """Batch and instance norm: each channel by itself; a PReLU's slopes go the same way."""
    first, *others = [walk.value(n) for n in node.all_input_nodes]
    axis = 1 if len(first.shape) > 1 else 0
    first = walk.separate(first, avoid=[a for a in range(len(first.shape)) if a != axis])
    if "instance_norm" in str(node.target):
        first = walk.pin_axes(first, range(2, len(first.shape)))
    sides = [walk.axis(other, 0) for other in others if other.shape and other.shape[0] > 1]
    labels = walk.tie(walk.axis(first, axis), *sides)
    blocks = [b for b in first.blocks if b.axes != (axis,)]
    if "batch_norm" in str(node.target) and arguments(node)["running_mean"] is None:
        for block in blocks:  # it standardises over all other axes, as where weights are its input
            walk.reduce(block.labels)
    made = [*blocks, *([] if labels is None else [Block((axis,), labels)])]
    value = walk.made(first.shape, made)
    return [value, *[None] * 2] if isinstance(node.meta["val"], (tuple, list)) else value  # type: ignore[list-item]


def last_norm(walk: Walk, node: fx.Node) -> Result:
    """Layer and RMS norm over the last axes."""
    named = arguments(node)
    x = walk.value(named["input"])
    count = len(named["normalized_shape"])
    over = range(len(x.shape) - count, len(x.shape))
    x = walk.separate(x, avoid=over, only=over)
    sides = [named.get("weight"), named.get("bias")]
    for axis in over:
        others = (
            [walk.axis(walk.value(s), axis - over[0]) for s in sides if s is not None]
            if x.shape[axis] > 1
            else []
        )
        labels = walk.tie(walk.axis(x, axis), *others)
        walk.reduce(labels)
        if labels is None and x.block(axis) is not None:
            x = walk.pin_axes(x, [axis])
    value = walk.made(x.shape, x.blocks)
    return [value, None, None] if isinstance(node.meta["val"], (tuple, list)) else value  # type: ignore[list-item]


def rewrite_last_norm(cut: Cut, node: fx.Node) -> None:
    shape = list(arguments(node)["normalized_shape"])
    rank = len(cut.value(node.args[0]).shape)
    set_argument(node, "normalized_shape", new_sizes(cut, node, shape, rank - len(shape)))


def group_norm(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    groups = named["num_groups"]
    x = walk.value(named["input"])
    x = walk.separate(x, avoid=range(2, len(x.shape)))
    x = walk.pin_axes(x, range(2, len(x.shape)))
    sides = [walk.axis(walk.value(named[n]), 0) for n in ("weight", "bias") if named[n] is not None]
    labels = walk.tie(walk.axis(x, 1), *sides)
    if labels is not None and groups < len(labels):
        if walk.group_norm == "groups" and groups > 1:
            walk.merge(labels.reshape(groups, -1), 0)
        else:
            walk.merge(labels.reshape(groups, -1), 1)
            walk.reduce(labels)
    blocks = [b for b in x.blocks if b.axes != (1,)]
    return walk.made(x.shape, [*blocks, *([] if labels is None else [Block((1,), labels)])])


def rewrite_group_norm(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    width, groups = cut.value(named["input"]).shape[1], named["num_groups"]
    if cut.count(named["input"], 1) is None:
        return
    if groups == width or cut.whole_rows(named["input"], 1, groups):
        set_argument(node, "num_groups", cut.size(named["input"], 1) * groups // width)


def reduction(walk: Walk, node: fx.Node) -> Result:
    """Sums, means, extremes and norms over some axes: they see how many there are."""
    named = arguments(node)
    x = walk.value(node.args[0])
    given = next((named[n] for n in ("dim", "dims", "axis") if n in named), None)
    over = listed(given, len(x.shape))
    x = walk.separate(x, avoid=over, only=over)
    for axis in over:
        walk.reduce(walk.axis(x, axis))
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [reduced(walk, x, over, shape_of(v)) for v in values]
    return reduced(walk, x, over, shape_of(values))


def index_of_extreme(walk: Walk, node: fx.Node) -> Result:
    """argmax: numbers of indices, which a cut would shift."""
    x = walk.value(node.args[0])
    over = listed(arguments(node)["dim"], len(x.shape))
    x = walk.pin_axes(walk.separate(x, avoid=over, only=over), over)
    return reduced(walk, x, over, out_shape(node))


def along(walk: Walk, node: fx.Node) -> Result:
    """Softmax, cumulative sums: every index of an axis sees the others."""
    x = walk.value(node.args[0])
    over = listed(arguments(node)["dim"], len(x.shape))
    x = walk.separate(x, avoid=over, only=over)
    for axis in over:
        walk.reduce(walk.axis(x, axis))
    return walk.made(x.shape, x.blocks, x.constant)


def cosine(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    operands = [walk.value(named["x1"]), walk.value(named["x2"])]
    shape = tuple(np.broadcast_shapes(*[v.shape for v in operands]))
    both = combine(walk, operands, shape)
    over = listed(named["dim"], len(shape))
    both = walk.separate(both, avoid=over, only=over)
    walk.reduce(walk.axis(both, over[0]))
    return reduced(walk, both, over, out_shape(node))
