"""Ops that change a shape and keep the elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk
from paredown.graph.coupling.rules.common import (
    check_sizes,
    combine,
    moved,
    new_sizes,
    out_shape,
    unknown,
)
from paredown.graph.edit import keep_meta
from paredown.graph.ops import arguments, listed, set_argument
from paredown.graph.state import taken

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


aten = torch.ops.aten


def reshape(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    value = reshaped(walk, walk.value(node.args[0]), out_shape(node))
    for name in ("size", "shape"):
        if name in named:
            return check_sizes(walk, value, named[name])
    if "sizes" in named:
        first = named["dim"] % len(walk.value(node.args[0]).shape)
        value = check_sizes(walk, value, named["sizes"], first)
    return value


def reshaped(walk: Walk, value: Value, shape: tuple[int, ...]) -> Value:
    """The same elements in another shape: dimensions are split and merged."""
    parts = segments(value.shape, shape)
    blocks = []
    for ins, outs in _linked(value, parts):
        inside = [b for b in value.blocks if set(b.axes) & set(ins)]
        if not inside or not outs:
            continue
        block = max(inside, key=lambda b: b.labels.size)
        walk.pin_all([Value((), (b,)) for b in inside if b is not block])
        sizes = [value.shape[a] for a in ins]
        spread = block.labels.reshape(
            [s if a in block.axes else 1 for a, s in zip(ins, sizes, strict=True)]
        )
        full = np.broadcast_to(spread, sizes)
        blocks.append(Block(tuple(outs), full.reshape([shape[a] for a in outs])))
    return walk.made(shape, blocks, value.constant)


def segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of both shapes in smallest parts of the same number of elements, size 1 left out.

    Example:
        >>> segments((2, 12, 5), (2, 3, 4, 5))
        [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    ins = [a for a, s in enumerate(old) if s != 1]
    outs = [a for a, s in enumerate(new) if s != 1]
    parts = []
    while ins or outs:
        one, two = [ins.pop(0)] if ins else [], [outs.pop(0)] if outs else []
        while (a := math.prod(old[i] for i in one)) != (b := math.prod(new[i] for i in two)):
            if a < b and ins:
                one.append(ins.pop(0))
            elif outs:
                two.append(outs.pop(0))
            else:
                one += ins
                ins = []
                break
        parts.append((one, two))
    return parts


def _linked(
    value: Value, parts: list[tuple[list[int], list[int]]]
) -> list[tuple[list[int], list[int]]]:
    """Parts that a joint block spans become one."""
    found = [(list(ins), list(outs)) for ins, outs in parts]
    for block in value.joint():
        touched = [p for p in found if set(p[0]) & set(block.axes)]
        if len(touched) > 1:
            merged = ([a for p in touched for a in p[0]], [a for p in touched for a in p[1]])
            found = [p for p in found if p not in touched] + [merged]
    return found


def rewrite_reshape(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    for name in ("size", "shape"):
        if name in named:
            set_argument(node, name, new_sizes(cut, node, named[name]))
            return
    if "sizes" in named:  # unflatten
        first = named["dim"] % len(cut.value(node.args[0]).shape)
        set_argument(node, "sizes", new_sizes(cut, node, named["sizes"], first))


def view_as(walk: Walk, node: fx.Node) -> Result:
    """The shape of another tensor, which is cut in the same way."""
    made = reshaped(walk, walk.value(node.args[0]), out_shape(node))
    other = walk.value(node.args[1])
    return combine(walk, [made, other], made.shape)


def squeeze(walk: Walk, node: fx.Node) -> Result:
    x, shape = walk.value(node.args[0]), out_shape(node)
    given = listed(arguments(node).get("dim"), len(x.shape))
    # an axis that is named, and may be cut to size 1, would vanish then
    x = walk.pin_axes(x, [a for a in given if "dim" in arguments(node) and x.shape[a] > 1])
    gone = [a for a in given if x.shape[a] == 1]
    place = {a: n for n, a in enumerate(a for a in range(len(x.shape)) if a not in gone)}
    return walk.made(shape, moved(x, place), x.constant)


def rewrite_squeeze(cut: Cut, node: fx.Node) -> None:
    x = cut.value(node.args[0])
    sizes = [cut.size(node.args[0], a) for a in range(len(x.shape))]
    if "dim" not in arguments(node) and sizes.count(1) > x.shape.count(1):
        node.target = aten.squeeze.dims
        node.args = (node.args[0], [a for a, s in enumerate(x.shape) if s == 1])


def unsqueeze(walk: Walk, node: fx.Node) -> Result:
    x, shape = walk.value(node.args[0]), out_shape(node)
    at = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    return walk.made(shape, moved(x, {a: a + (a >= at) for a in range(len(x.shape))}), x.constant)


def permute(walk: Walk, node: fx.Node) -> Result:
    """Any op that only reorders axes: where each went is seen on numbered axes."""
    x = walk.value(node.args[0])
    axes = torch.empty(tuple(range(2, len(x.shape) + 2)), device="meta")
    target: Any = node.target
    order = [s - 2 for s in target(axes, *node.args[1:], **node.kwargs).shape]
    place = {old: new for new, old in enumerate(order)}
    return walk.made([x.shape[a] for a in order], moved(x, place), x.constant)


def expand(walk: Walk, node: fx.Node) -> Result:
    """A size of 1 becomes n equal copies, which can be cut by writing a smaller n."""
    x, shape = walk.value(node.args[0]), out_shape(node)
    sizes: Any = arguments(node)["size"]
    shift = len(shape) - len(x.shape)
    blocks = moved(x, {a: a + shift for a in range(len(x.shape))})
    for axis, size in enumerate(shape):
        old = x.shape[axis - shift] if axis >= shift else 1
        if old == 1 and size > 1 and isinstance(sizes[axis], int):
            blocks.append(Block((axis,), walk.labels.fresh(size)))
    return check_sizes(walk, walk.made(shape, blocks, x.constant), sizes)


def rewrite_sizes(cut: Cut, node: fx.Node) -> None:
    set_argument(node, "size", new_sizes(cut, node, arguments(node)["size"]))


def expand_as(walk: Walk, node: fx.Node) -> Result:
    x, other = walk.value(node.args[0]), walk.value(node.args[1])
    return combine(walk, [x, other], out_shape(node))


def repeat(walk: Walk, node: fx.Node) -> Result:
    x, shape = walk.value(node.args[0]), out_shape(node)
    repeats = _repeats(node, len(shape))
    shift = len(shape) - len(x.shape)
    tiled = [a for a in range(len(x.shape)) if repeats[a + shift] != 1]
    x = walk.separate(x, only=tiled)
    blocks = moved(x, {a: a + shift for a in range(len(x.shape))})
    blocks = [
        Block(b.axes, np.tile(b.labels, repeats[b.axes[0]]))
        if b.axes[0] - shift in tiled and isinstance(repeats[b.axes[0]], int)
        else b
        for b in blocks
    ]
    for axis, size in enumerate(shape):
        old = x.shape[axis - shift] if axis >= shift else 1
        if old == 1 and size > 1 and isinstance(repeats[axis], int):
            blocks.append(Block((axis,), walk.labels.fresh(size)))
    good = [
        b for b in blocks if all(shape[a] == s for a, s in zip(b.axes, b.labels.shape, strict=True))
    ]
    walk.pin_all(
        [Value(shape, tuple(b for b in blocks if b not in good))] if len(good) < len(blocks) else []
    )
    return walk.made(shape, good, x.constant)


def _repeats(node: fx.Node, rank: int) -> list[Any]:
    """How often each axis of the result is repeated; tile leaves out leading ones."""
    named = arguments(node)
    given = list(named["dims"] if "dims" in named else named["repeats"])
    return [1] * (rank - len(given)) + given


def rewrite_repeat(cut: Cut, node: fx.Node) -> None:
    x = cut.value(node.args[0])
    repeats = _repeats(node, len(cut.value(node).shape))
    shift = len(repeats) - len(x.shape)
    for axis, count in enumerate(repeats):
        old = x.shape[axis - shift] if axis >= shift else 1
        new = cut.count(node, axis)
        if old == 1 and isinstance(count, int) and new is not None:
            repeats[axis] = new
    set_argument(node, "dims" if "dims" in arguments(node) else "repeats", repeats)


def repeat_interleave(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x, times, dim = walk.value(node.args[0]), named.get("repeats"), named.get("dim")
    if dim is None:
        return unknown(walk, node)
    dim %= len(x.shape)
    x = walk.separate(x, only=[dim])
    if not isinstance(times, int) or x.shape[dim] == 1 or named.get("output_size") is not None:
        walk.pin_all(walk.tensors(node)[1:])
        return walk.made(out_shape(node), walk.pin_axes(x, [dim]).blocks, x.constant)
    blocks = [
        Block(b.axes, np.repeat(b.labels, times)) if b.axes == (dim,) else b for b in x.blocks
    ]
    return walk.made(out_shape(node), blocks, x.constant)


def filled(walk: Walk, node: fx.Node) -> Result:
    """zeros, full, empty: one value everywhere, so any index can be cut by a smaller size."""
    sizes = arguments(node)["size"]
    shape = out_shape(node)
    axes = [a for a, size in enumerate(sizes) if isinstance(size, int)]
    return walk.fresh(shape, axes)


def counted(walk: Walk, node: fx.Node) -> Result:
    """arange, linspace, eye of a size that is written out: as a buffer of these numbers."""
    shape = out_shape(node)
    return walk.fresh(shape, [] if node.all_input_nodes else range(len(shape)), constant=True)


def rewrite_counted(cut: Cut, node: fx.Node) -> None:
    """The numbers of the indices that stay, which may follow no rule any more, become a buffer."""
    kept = {
        axis: torch.from_numpy(stays.nonzero()[0])
        for axis in range(len(cut.value(node).shape))
        if (stays := cut.kept(node, axis)) is not None
    }
    owner = node.graph.owning_module
    if not kept or owner is None:
        return
    numbers = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
    owner.register_buffer(f"{node.name}_kept", taken(numbers, kept), persistent=False)
    with node.graph.inserting_before(node):
        held = node.graph.get_attr(f"{node.name}_kept")
    keep_meta(held, node)
    node.replace_all_uses_with(held)
    node.graph.erase_node(node)


def as_real(walk: Walk, node: fx.Node) -> Result:
    """Complex numbers as a last axis of two, or back."""
    x, shape = walk.value(node.args[0]), out_shape(node)
    if len(shape) < len(x.shape):
        last = len(x.shape) - 1
        for block in [b for b in x.joint() if last in b.axes]:
            at = block.axes.index(last)
            walk.labels.union(block.labels, block.labels.take([0], at))
            rest = Block(block.axes[:-1], block.labels.take(0, at))
            x = replace(x, blocks=(*[b for b in x.blocks if b is not block], rest))
        x = walk.pin_axes(x, [last])
    return walk.made(shape, x.blocks, x.constant)
