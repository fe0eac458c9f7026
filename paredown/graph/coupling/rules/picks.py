"""Ops that pick, join, pad and reorder indices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk, shape_of
from paredown.graph.coupling.rules.common import combine, moved, out_shape, unknown
from paredown.graph.ops import arguments, listed, set_argument

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


aten = torch.ops.aten


def cat(walk: Walk, node: fx.Node) -> Result:
    named, shape = arguments(node), out_shape(node)
    dim = named["dim"] % len(shape)
    parts = [walk.value(n) for n in named["tensors"]]
    parts = [v for v in parts if len(v.shape) == len(shape)]  # not an empty one of one axis
    axes = {b.axes for v in parts for b in v.joint()}
    alike = len(axes) == 1 and all(len(v.joint()) == 1 for v in parts)
    if axes and not (alike and dim in next(iter(axes))):
        parts = [walk.separate(v, avoid=[dim]) for v in parts]
        return _cat_apart(walk, parts, shape, dim)
    if not axes:
        return _cat_apart(walk, parts, shape, dim)
    joint = next(iter(axes))
    labels = np.concatenate([v.joint()[0].labels for v in parts], axis=joint.index(dim))
    rest = [replace(v, blocks=tuple(b for b in v.blocks if b.axes != joint)) for v in parts]
    made = _cat_apart(walk, rest, shape, dim)
    return walk.made(shape, [*made.blocks, Block(joint, labels)])


def _cat_apart(walk: Walk, parts: list[Value], shape: tuple[int, ...], dim: int) -> Value:
    blocks = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        seen = [walk.axis(v, axis) for v in parts]
        if axis == dim:
            filled = [
                np.zeros(v.shape[axis], dtype=np.int64) if each is None else each
                for v, each in zip(parts, seen, strict=True)
            ]
            blocks.append(Block((axis,), np.concatenate(filled)))
        elif (tied := walk.tie(*seen)) is not None:
            blocks.append(Block((axis,), tied))
    return walk.made(shape, blocks, all(v.constant for v in parts))


def stack(walk: Walk, node: fx.Node) -> Result:
    named, shape = arguments(node), out_shape(node)
    at = named["dim"] % len(shape)
    inner = [s for a, s in enumerate(shape) if a != at]
    made = combine(walk, [walk.value(n) for n in named["tensors"]], inner)
    return walk.made(shape, moved(made, {a: a + (a >= at) for a in range(len(inner))}))


def slice_rule(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x = walk.value(node.args[0])
    dim = named["dim"] % len(x.shape)
    step = named.get("step", 1)
    block = x.block(dim)
    if block is None:
        return walk.made(out_shape(node), x.blocks, x.constant)
    start, end = named.get("start"), named.get("end")
    if any(isinstance(b, fx.Node) for b in (start, end)) or not isinstance(step, int):
        x = walk.pin_axes(x, [dim])
        return walk.made(out_shape(node), x.blocks, x.constant)
    if step != 1:
        x = _strided(walk, x, dim, step)
    return part_of(walk, x, dim, slice(start, end, step), out_shape(node))


def _strided(walk: Walk, x: Value, dim: int, step: int) -> Value:
    """Every n-th index: neighbours are cut together, so that each n-th stays what it is."""
    x = walk.separate(x, avoid=[dim], only=[dim])
    labels = walk.axis(x, dim)
    if labels is not None and len(labels) % step == 0:
        walk.merge(labels.reshape(-1, step), 0)
        return x
    return walk.pin_axes(x, [dim])


def part_of(walk: Walk, x: Value, dim: int, part: slice, shape: tuple[int, ...]) -> Value:
    blocks = []
    for block in x.blocks:
        if dim in block.axes:
            if shape[dim] == 1:  # the one index must stay, or nothing would be left
                walk.fix(block, dim, part)
            index = tuple(part if a == dim else slice(None) for a in block.axes)
            block = Block(block.axes, block.labels[index])
            if shape[dim] < x.shape[dim]:
                walk.parts.append(block.labels)
        blocks.append(block)
    return walk.made(shape, blocks, x.constant)


def narrow(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x = walk.value(node.args[0])
    dim = named["dim"] % len(x.shape)
    start, length = named["start"], named["length"]
    if x.block(dim) is not None and not (isinstance(start, int) and isinstance(length, int)):
        x = walk.pin_axes(x, [dim])
    if x.block(dim) is None:
        return walk.made(out_shape(node), x.blocks, x.constant)
    start %= x.shape[dim]
    return part_of(walk, x, dim, slice(start, start + length), out_shape(node))


def rewrite_slice(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    kept = cut.kept(node.args[0], named["dim"])
    if kept is None:
        return
    step = named.get("step", 1)
    start, stop, _ = slice(named.get("start"), named.get("end"), step).indices(len(kept))
    set_argument(node, "start", int(kept[:start].sum()))
    set_argument(node, "end", int(kept[:stop].sum()))


def rewrite_narrow(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    kept = cut.kept(node.args[0], named["dim"])
    if kept is not None:
        start = named["start"] % len(kept)
        set_argument(node, "start", int(kept[:start].sum()))
        set_argument(node, "length", int(kept[start : start + named["length"]].sum()))


def split(walk: Walk, node: fx.Node) -> Result:
    """split, chunk, split_with_sizes, tensor_split: parts one after another."""
    named = arguments(node)
    x = walk.value(node.args[0])
    dim = named["dim"] % len(x.shape)
    shapes = [shape_of(v) for v in node.meta["val"]]
    starts = np.cumsum([0, *[shape[dim] for shape in shapes]])
    parts = zip(shapes, starts, strict=False)
    return [part_of(walk, x, dim, slice(at, at + s[dim]), s) for s, at in parts]


def rewrite_split(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    dim = named["dim"] % len(cut.value(node.args[0]).shape)
    kept = cut.kept(node.args[0], dim)
    if kept is None:
        return
    bounds = np.cumsum([0, *[part.shape[dim] for part in cut.parts(node)]])
    counts = [int(kept[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], counts, dim), {}


def select(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x = walk.value(node.args[0])
    dim, index = named["dim"] % len(x.shape), named["index"]
    if isinstance(index, fx.Node):
        x = walk.pin_axes(x, [dim])
        index = 0
    return _picked(walk, x, dim, index, out_shape(node))


def _picked(walk: Walk, x: Value, dim: int, index: int, shape: tuple[int, ...]) -> Value:
    """One index of an axis, which must stay; the axes of a joint block go on without it."""
    place = {a: a - (a > dim) for a in range(len(x.shape)) if a != dim}
    blocks = moved(x, place)
    block = x.block(dim)
    if block is not None:
        walk.fix(block, dim, slice(index, index + 1 or None))
    if block is not None and len(block.axes) > 1:
        axes = tuple(place[a] for a in block.axes if a != dim)
        blocks.append(Block(axes, block.labels.take(index, block.axes.index(dim))))
    return walk.made(shape, blocks, x.constant)


def rewrite_select(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    kept = cut.kept(node.args[0], named["dim"])
    if kept is not None:
        set_argument(node, "index", int(kept[: named["index"] % len(kept)].sum()))


def unbind(walk: Walk, node: fx.Node) -> Result:
    x = walk.value(node.args[0])
    dim = arguments(node)["dim"] % len(x.shape)
    if x.block(dim) is not None and len(x.block(dim).axes) == 1:  # type: ignore[union-attr]
        x = walk.pin_axes(x, [dim])
    shapes = [shape_of(v) for v in node.meta["val"]]
    return [_picked(walk, x, dim, index, shape) for index, shape in enumerate(shapes)]


def index_rule(walk: Walk, node: fx.Node) -> Result:
    """Advanced indexing: the indexed axes are pinned, the others go on."""
    named = arguments(node)
    x, indices = walk.value(named["self"]), list(named["indices"])
    used = [a for a, i in enumerate(indices) if i is not None]
    given = [walk.value(indices[a]) for a in used]
    if any(indices[a].meta["val"].dtype in (torch.bool, torch.uint8) for a in used):
        return unknown(walk, node)
    walk.pin_all(given)
    x = walk.pin_axes(walk.separate(x, avoid=used, only=used), used)
    shape = out_shape(node)
    width = len(np.broadcast_shapes(*[v.shape for v in given])) if given else 0
    adjacent = used == list(range(used[0], used[-1] + 1))
    rest = [a for a in range(len(x.shape)) if a not in used]
    if adjacent:
        place = {a: (a if a < used[0] else a - len(used) + width) for a in rest}
    else:
        place = {a: width + n for n, a in enumerate(rest)}
    return walk.made(shape, moved(x, place))


def index_select(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x = walk.value(named["self"])
    dim = named["dim"] % len(x.shape)
    walk.pin_all([walk.value(named["index"])])
    x = walk.pin_axes(walk.separate(x, avoid=[dim], only=[dim]), [dim])
    return walk.made(out_shape(node), x.blocks)


def pad(walk: Walk, node: fx.Node) -> Result:
    named, shape = arguments(node), out_shape(node)
    x, amounts = walk.value(named["self"]), list(named["pad"])
    touched = _padded(amounts, len(shape))
    x = walk.separate(x, avoid=list(touched), only=list(touched))
    if named.get("mode", "constant") != "constant":
        x = walk.pin_axes(x, list(touched))
    blocks = []
    for block in x.blocks:
        before, after = touched.get(block.axes[0], (0, 0))
        if len(block.axes) > 1 or (before, after) == (0, 0):
            blocks.append(block)
        elif isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0:
            ends = walk.labels.fresh(before), walk.labels.fresh(after)
            blocks.append(Block(block.axes, np.concatenate([ends[0], block.labels, ends[1]])))
        else:
            walk.pin(block.labels)
    return walk.made(shape, blocks)


def _padded(amounts: list[Any], rank: int) -> dict[int, tuple[Any, Any]]:
    """axis -> (before, after); amounts go from the last axis backwards in pairs."""
    pairs = zip(amounts[::2], amounts[1::2], strict=False)
    return {rank - 1 - n: pair for n, pair in enumerate(pairs) if pair != (0, 0)}


def rewrite_pad(cut: Cut, node: fx.Node) -> None:
    named = arguments(node)
    amounts, rank = list(named["pad"]), len(cut.value(node.args[0]).shape)
    for axis, (before, after) in _padded(amounts, rank).items():
        kept = cut.kept(node, axis)
        if kept is not None:
            at = 2 * (rank - 1 - axis)
            amounts[at] = int(kept[:before].sum())
            amounts[at + 1] = int(kept[len(kept) - after :].sum())
    set_argument(node, "pad", amounts)


def copy_part(walk: Walk, node: fx.Node) -> Result:
    """slice_scatter, select_scatter: a part of the first operand is overwritten."""
    named = arguments(node)
    x, source = walk.value(named["self"]), walk.value(named["src"])
    dim = named["dim"] % len(x.shape)
    x = walk.pin_axes(walk.separate(x, avoid=[dim]), [dim])
    if "index" in named:
        shape = tuple(s for a, s in enumerate(x.shape) if a != dim)
        part = Value(
            shape, tuple(moved(x, {a: a - (a > dim) for a in range(len(x.shape)) if a != dim}))
        )
    else:
        part = Value(source.shape, x.blocks)
    combine(walk, [walk.separate(source), part], part.shape)
    return walk.made(x.shape, x.blocks)


def flip(walk: Walk, node: fx.Node) -> Result:
    x, dims = walk.value(node.args[0]), listed(arguments(node)["dims"], 99)
    dims = [d % len(x.shape) for d in dims]
    blocks = []
    for block in x.blocks:
        index = tuple(slice(None, None, -1 if a in dims else None) for a in block.axes)
        blocks.append(Block(block.axes, block.labels[index]))
    return walk.made(x.shape, blocks, x.constant)


def roll(walk: Walk, node: fx.Node) -> Result:
    x = walk.value(node.args[0])
    dims = listed(arguments(node)["dims"], len(x.shape))
    x = walk.pin_axes(walk.separate(x, avoid=dims, only=dims), dims)
    return walk.made(x.shape, x.blocks, x.constant)


def triangle(walk: Walk, node: fx.Node) -> Result:
    x = walk.value(node.args[0])
    last = [len(x.shape) - 2, len(x.shape) - 1]
    x = walk.pin_axes(walk.separate(x, avoid=last, only=last), last)
    return walk.made(x.shape, x.blocks, x.constant)
