"""What the rules share: arguments by name, sizes that are written out, broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk, shape_of

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


def out_shape(node: fx.Node) -> tuple[int, ...]:
    return shape_of(node.meta["val"])


def new_sizes(cut: Cut, node: fx.Node, sizes: Sequence[Any], first: int = 0) -> list[Any]:
    """Written-out sizes of the result's axes from ``first`` on, after the cut.

    A symbolic size of a cut axis becomes -1: what it was computed from may be cut, or may not.
    """
    found = list(sizes)
    for place, size in enumerate(found):
        count = cut.count(node, first + place)
        if count is not None and not (isinstance(size, int) and size < 0):
            found[place] = count if isinstance(size, int) else -1
    return found


def check_sizes(walk: Walk, value: Value, sizes: Sequence[Any], first: int = 0) -> Value:
    """Pins what `new_sizes` could not say: two axes cannot both be left to be found out."""
    unknown = [p for p, s in enumerate(sizes) if isinstance(s, int) and s < 0]
    symbolic = [p for p, s in enumerate(sizes) if not isinstance(s, int) and value.block(first + p)]
    for place in symbolic if unknown else symbolic[1:]:
        value = walk.pin_axes(value, [first + place])
    return value


def moved(x: Value, place: dict[int, int]) -> list[Block]:
    """The blocks on their new axes; those whose axes are gone drop out."""
    found = []
    for block in x.blocks:
        if all(a in place for a in block.axes):
            axes = [place[a] for a in block.axes]
            order = sorted(range(len(axes)), key=axes.__getitem__)
            found.append(Block(tuple(sorted(axes)), block.labels.transpose(order)))
    return found


def reduced(walk: Walk, x: Value, over: list[int], shape: tuple[int, ...]) -> Value:
    if len(shape) == len(x.shape):
        place = {a: a for a in range(len(shape)) if a not in over}
    else:
        place = {a: n for n, a in enumerate(a for a in range(len(x.shape)) if a not in over)}
    return walk.made(shape, moved(x, place), x.constant)


def combine(walk: Walk, operands: Sequence[Value], shape: Sequence[int]) -> Value:
    """Operands that are broadcast against each other: an axis they share is one dimension."""
    aligned = [_aligned(value, shape) for value in operands]
    aligned = [_agree(walk, value, aligned, shape) for value in aligned]
    blocks: list[Block] = []
    done: set[int] = set()
    for value in aligned:
        for block in value.blocks:
            if block.axes[0] in done:
                continue
            done |= set(block.axes)
            seen = [v.block(block.axes[0]) for v in aligned if present(v, block.axes[0], shape)]
            tied = walk.tie(*[b.labels if b is not None else None for b in seen])
            if tied is not None:
                blocks.append(block)
    return walk.made(shape, blocks)


def _aligned(value: Value, shape: Sequence[int]) -> Value:
    """The operand with its axes moved to where they stand in the result."""
    shift = len(shape) - len(value.shape)
    blocks = tuple(Block(tuple(a + shift for a in b.axes), b.labels) for b in value.blocks)
    return Value((1,) * shift + value.shape, blocks, value.constant)


def present(value: Value, axis: int, shape: Sequence[int]) -> bool:
    """Whether the operand has the axis, not only a size of 1 that is broadcast."""
    return value.shape[axis] == shape[axis] and shape[axis] > 1


def _agree(walk: Walk, value: Value, others: Sequence[Value], shape: Sequence[int]) -> Value:
    """Joint blocks stay joint where every operand has the same axes in one block."""
    for block in value.joint():
        same = True
        for other in others:
            there = [present(other, axis, shape) for axis in block.axes]
            mine = other.block(block.axes[there.index(True)]) if any(there) else None
            same &= not any(there) or (all(there) and mine is not None and mine.axes == block.axes)
        if not same:
            value = walk.apart(value, block, _carrier(walk, block, others, shape))
    return value


def _carrier(walk: Walk, block: Block, others: Sequence[Value], shape: Sequence[int]) -> int:
    """The first axis (the last, where dimensions of heads are to be cut) that nothing pins."""

    def free(axis: int) -> bool:
        return all(v.block(axis) is not None for v in others if present(v, axis, shape))

    axes = block.axes if walk.attention == "heads" else block.axes[::-1]
    return next((axis for axis in axes if free(axis)), axes[0])


def elementwise(walk: Walk, node: fx.Node) -> Result:
    shape = out_shape(node)
    operands = [v for v in walk.tensors(node) if v.shape]
    made = combine(walk, operands, shape)
    return replace(made, constant=bool(operands) and all(v.constant for v in operands))


def first_operand(walk: Walk, node: fx.Node) -> Result:
    """As the first operand; the others give a dtype or a device."""
    value = walk.value(node.args[0])
    return walk.made(value.shape, value.blocks, value.constant)


def pinned(walk: Walk, node: fx.Node) -> Result:
    """Every index means something of its own: nothing of the operands can be cut."""
    walk.pin_all(walk.tensors(node))
    values = node.meta.get("val")
    if isinstance(values, Tensor):
        return Value(shape_of(values))
    if isinstance(values, (tuple, list)):
        return [Value(shape_of(v)) if isinstance(v, Tensor) else None for v in values]  # type: ignore[misc]
    return None


def unknown(walk: Walk, node: fx.Node) -> Result:
    """An op without a rule: always safe, and told."""
    return pinned(walk, node)


def symbolic(walk: Walk, node: fx.Node) -> Result:
    """A size that the graph computes with: it must stay what it is."""
    if node.args and isinstance(node.args[0], fx.Node):
        value = walk.values.get(node.args[0])
        if isinstance(value, Value) and len(node.args) > 1:
            walk.pin_axes(value, [int(node.args[1]) % len(value.shape)])  # type: ignore[arg-type]
    return None


def getitem(walk: Walk, node: fx.Node) -> Result:
    source = walk.values.get(node.args[0])  # type: ignore[arg-type]
    index = node.args[1]
    return source[index] if isinstance(source, list) and isinstance(index, int) else None
