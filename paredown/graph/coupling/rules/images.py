"""Pooling, resizing, and the shuffles between channels and places."""

from __future__ import annotations

import math

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk, shape_of
from paredown.graph.coupling.rules.common import out_shape
from paredown.graph.ops import arguments


def spatial(walk: Walk, node: fx.Node) -> Result:
    """Pooling, resizing: the last axes are mixed or resampled, the channels are not."""
    x = walk.value(node.args[0])
    values = node.meta["val"]
    shape = shape_of(values[0] if isinstance(values, (tuple, list)) else values)
    changed = list(range(2, len(x.shape))) if len(x.shape) > 2 else [len(x.shape) - 1]
    x = walk.pin_axes(walk.separate(x, avoid=changed, only=changed), changed)
    walk.pin_all(walk.tensors(node)[1:])
    made = walk.made(shape, x.blocks)
    return [made] * len(values) if isinstance(values, (tuple, list)) else made


def pixel_shuffle(walk: Walk, node: fx.Node) -> Result:
    """(..., C r r, H, W) -> (..., C, H r, W r)."""
    return _shuffled(walk, node, int(node.args[1]) ** 2, merge=True)  # type: ignore[arg-type]


def pixel_unshuffle(walk: Walk, node: fx.Node) -> Result:
    return _shuffled(walk, node, int(node.args[1]) ** 2, merge=False)  # type: ignore[arg-type]


def _shuffled(walk: Walk, node: fx.Node, area: int, merge: bool) -> Value:
    x, shape = walk.value(node.args[0]), out_shape(node)
    axis = len(x.shape) - 3
    x = walk.separate(x, avoid=[axis + 1, axis + 2])
    x = walk.pin_axes(x, [axis + 1, axis + 2])
    labels = walk.axis(x, axis)
    blocks = [b for b in x.blocks if b.axes != (axis,)]
    if labels is not None:
        found = walk.merge(labels.reshape(-1, area), 0) if merge else np.repeat(labels, area)
        blocks.append(Block((axis,), found))
    return walk.made(shape, blocks)


def channel_shuffle(walk: Walk, node: fx.Node) -> Result:
    x, groups = walk.value(node.args[0]), int(node.args[1])  # type: ignore[arg-type]
    x = walk.separate(x, only=[1])
    labels = walk.axis(x, 1)
    blocks = [b for b in x.blocks if b.axes != (1,)]
    if labels is not None:
        walk.merge(labels.reshape(groups, -1), 1)
        blocks.append(Block((1,), labels.reshape(groups, -1).T.ravel()))
    return walk.made(x.shape, blocks)


def im2col(walk: Walk, node: fx.Node) -> Result:
    """(B, C, H, W) -> (B, C k k, L), or back."""
    named = arguments(node)
    x, shape = walk.value(node.args[0]), out_shape(node)
    area = math.prod(named["kernel_size"])
    x = walk.separate(x, avoid=range(2, len(x.shape)))
    x = walk.pin_axes(x, range(2, len(x.shape)))
    labels = walk.axis(x, 1)
    if labels is None:
        return walk.made(shape, [])
    back = "col2im" in str(node.target)
    found = walk.merge(labels.reshape(-1, area), 0) if back else np.repeat(labels, area)
    return walk.made(shape, [Block((1,), found)])


def unfold(walk: Walk, node: fx.Node) -> Result:
    x, named = walk.value(node.args[0]), arguments(node)
    dim = named["dimension"] % len(x.shape)
    x = walk.pin_axes(walk.separate(x, avoid=[dim], only=[dim]), [dim])
    return walk.made(out_shape(node), x.blocks, x.constant)


def glu(walk: Walk, node: fx.Node) -> Result:
    x = walk.value(node.args[0])
    dim = arguments(node)["dim"] % len(x.shape)
    x = walk.separate(x, avoid=[dim], only=[dim])
    labels = walk.axis(x, dim)
    blocks = [b for b in x.blocks if b.axes != (dim,)]
    if labels is not None:
        blocks.append(Block((dim,), walk.merge(labels.reshape(2, -1), 1)))
    return walk.made(out_shape(node), blocks)
