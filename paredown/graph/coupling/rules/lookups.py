"""Ops that look up, scatter and sort along one axis, and transform along some; others go on."""

from __future__ import annotations

from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk, shape_of
from paredown.graph.ops import arguments, listed


def fixed_along(walk: Walk, node: fx.Node) -> Result:
    """Sorting, Fourier transforms, quarter turns: the axes they go along stay whole."""
    named = arguments(node)
    x = walk.value(node.args[0])
    over = listed(next((named[n] for n in ("dim", "dims") if n in named), -1), len(x.shape))
    x = walk.pin_axes(walk.separate(x, avoid=over, only=over), over)
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [walk.made(shape_of(v), x.blocks) for v in values]
    return walk.made(shape_of(values), x.blocks)


def gather(walk: Walk, node: fx.Node) -> Result:
    """``out[i, j] = x[index[i, j], j]``: beside ``dim``, ``x`` and ``index`` share their axes."""
    named = arguments(node)
    x, index = walk.value(named["self"]), walk.value(named["index"])
    dim = named["dim"] % max(1, len(x.shape))
    x = walk.pin_axes(walk.separate(x, avoid=[dim]), [dim])
    return walk.made(index.shape, _side_by_side(walk, [walk.separate(index), x], dim))


def scatter(walk: Walk, node: fx.Node) -> Result:
    """``out[index[i, j], j] = source[i, j]`` over ``x``: the axes beside ``dim`` are shared."""
    named = arguments(node)
    x, index, source = walk.value(named["self"]), walk.value(named["index"]), named.get("src")
    dim = named["dim"] % max(1, len(x.shape))
    x = walk.pin_axes(walk.separate(x, avoid=[dim]), [dim])
    others = [index] + ([walk.value(source)] if isinstance(source, fx.Node) else [])
    others = [walk.pin_axes(walk.separate(v, avoid=[dim]), [dim]) for v in others]
    return walk.made(x.shape, _side_by_side(walk, [x, *others], dim))


def index_add(walk: Walk, node: fx.Node) -> Result:
    """index_add, index_copy: slices of ``source`` go to places of ``dim``."""
    named = arguments(node)
    x, source = walk.value(named["self"]), walk.value(named["source"])
    dim = named["dim"] % max(1, len(x.shape))
    walk.pin_all([walk.value(named["index"])])
    x, source = (walk.pin_axes(walk.separate(v, avoid=[dim]), [dim]) for v in (x, source))
    return walk.made(x.shape, _side_by_side(walk, [x, source], dim))


def _side_by_side(walk: Walk, values: list[Value], dim: int) -> list[Block]:
    """Labels of the first value's axes; beside ``dim`` all have them, if all are of one size."""
    first, *others = values
    blocks = [b for b in first.blocks if b.axes == (dim,)]
    for axis in (a for a, size in enumerate(first.shape) if a != dim and size > 1):
        if any(v.shape[axis] != first.shape[axis] for v in others):
            for value in values:
                walk.pin_axes(value, [axis])
        elif (tied := walk.tie(*[walk.axis(v, axis) for v in values])) is not None:
            blocks.append(Block((axis,), tied))
    return blocks


def embedding_bag(walk: Walk, node: fx.Node) -> Result:
    """Sums, means or maxima of bags of rows; the other results say which rows went where."""
    named = arguments(node)
    weight = walk.pin_axes(walk.value(named["weight"]), [0])
    walk.pin_all(walk.tensors(node)[1:])
    labels, shapes = walk.axis(weight, 1), [shape_of(v) for v in node.meta["val"]]
    made = walk.made(shapes[0], [] if labels is None else [Block((1,), labels)])
    return [made, *[Value(shape) for shape in shapes[1:]]]
