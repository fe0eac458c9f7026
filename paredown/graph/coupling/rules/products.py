"""Sums of products: linear layers, matrix products, einsum, attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk
from paredown.graph.coupling.rules.common import combine, out_shape, unknown
from paredown.graph.ops import arguments, set_argument

if TYPE_CHECKING:
    from paredown.graph.coupling.sizes import Cut


def contract(walk: Walk, operands: list[tuple[Value, str]], out: str) -> Value:
    """A sum of products: an axis for each letter, summed over where ``out`` lacks it."""
    apart = []
    for value, letters in operands:
        alone = [a for a, c in enumerate(letters) if c not in out]
        own = [a for a, c in enumerate(letters) if sum(c in t for _, t in operands) == 1]
        apart.append((lead(walk, value, alone, own), letters))
    sizes: dict[str, int] = {}
    labels: dict[str, np.ndarray | None] = {}
    for letter in dict.fromkeys("".join(letters for _, letters in operands)):
        seen = [(v, t.index(letter)) for v, t in apart if letter in t]
        sizes[letter] = max(v.shape[a] for v, a in seen)
        labels[letter] = walk.tie(
            *[walk.axis(v, a) for v, a in seen if v.shape[a] > 1 or sizes[letter] == 1]
        )
        if letter not in out and not any(value.constant for value, _ in seen):
            walk.reduce(labels[letter])
    walk.count(1, *[labels[c] for c in sizes], sizes=list(sizes.values()))
    blocks = [Block((a,), found) for a, c in enumerate(out) if (found := labels[c]) is not None]
    constant = all(value.constant for value, _ in operands)
    return walk.made([sizes[c] for c in out], blocks, constant)


def lead(walk: Walk, value: Value, summed: list[int], own: list[int]) -> Value:
    """Heads are the axis that both operands share and keep; else anything that is not summed."""
    for block in value.joint():
        axes = block.axes if walk.attention == "heads" else block.axes[::-1]
        shared = [a for a in axes if a not in summed and a not in own]
        kept = [a for a in axes if a not in summed]
        if walk.attention == "heads":
            chosen = (shared or kept or list(axes))[0]
        else:
            chosen = next((a for a in axes if a not in shared), axes[0])
        value = walk.apart(value, block, chosen)
    return value


def linear(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    x, weight = walk.value(named["input"]), walk.value(named["weight"])
    rows = "abcdefgh"[: len(x.shape) - 1]
    made = contract(walk, [(x, rows + "k"), (weight, "nk")], rows + "n")
    return _add_bias(walk, made, named["bias"])


def addmm(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    pairs = [(named["mat1"], "mk"), (named["mat2"], "kn")]
    made = contract(walk, [(walk.value(n), letters) for n, letters in pairs], "mn")
    return _add_bias(walk, made, named["self"])


def baddbmm(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    pairs = [(named["batch1"], "bmk"), (named["batch2"], "bkn")]
    made = contract(walk, [(walk.value(n), letters) for n, letters in pairs], "bmn")
    return _add_bias(walk, made, named["self"])


def _add_bias(walk: Walk, made: Value, bias: Any) -> Value:
    if bias is None:
        return made
    return combine(walk, [made, walk.value(bias)], made.shape)


def matmul(walk: Walk, node: fx.Node) -> Result:
    first, second = (walk.value(source) for source in node.all_input_nodes[:2])
    if len(node.all_input_nodes) == 1:
        second = first
    left = "abcdefgh"[: max(0, max(len(first.shape), len(second.shape)) - 2)]
    one = left[len(left) - max(0, len(first.shape) - 2) :] + ("mk" if len(first.shape) > 1 else "k")
    two = left[len(left) - max(0, len(second.shape) - 2) :] + (
        "kn" if len(second.shape) > 1 else "k"
    )
    out = left + ("m" if "m" in one else "") + ("n" if "n" in two else "")
    return contract(walk, [(first, one), (second, two)], out)


def einsum(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    equation = named["equation"].replace(" ", "")
    operands = [walk.value(source) for source in named["tensors"]]
    given, arrow, out = equation.partition("->")
    terms = given.split(",")
    if "." in equation or not arrow or any(len(set(t)) < len(t) for t in terms):
        return unknown(walk, node)
    return contract(walk, list(zip(operands, terms, strict=True)), out)


def bilinear(walk: Walk, node: fx.Node) -> Result:
    """``x w y`` with a weight (out, x, y)."""
    named = arguments(node)
    x, y, weight = (walk.value(named[n]) for n in ("input1", "input2", "weight"))
    rows = "abcdefgh"[: len(x.shape) - 1]
    made = contract(walk, [(x, rows + "i"), (y, rows + "j"), (weight, "oij")], rows + "o")
    return _add_bias(walk, made, named["bias"])


def distances(walk: Walk, node: fx.Node) -> Result:
    """Between all pairs of rows (..., M, K) and (..., N, K): what both lack counts for nothing."""
    first, second = (walk.value(n) for n in node.all_input_nodes[:2])
    rows = "abcdefgh"[: len(first.shape) - 2]
    if len(first.shape) != len(second.shape):
        return unknown(walk, node)
    return contract(walk, [(first, rows + "mk"), (second, rows + "nk")], rows + "mn")


def outer(walk: Walk, node: fx.Node) -> Result:
    first, second = (walk.value(n) for n in (node.args[0], node.args[1]))
    return contract(walk, [(first, "m"), (second, "n")], "mn")


def attention(walk: Walk, node: fx.Node) -> Result:
    """Scaled dot products: heads are the third axis from the end."""
    named = arguments(node)
    query, key, value = (walk.value(named[n]) for n in ("query", "key", "value"))
    repeated = 1
    if len(query.shape) > 3 and named["enable_gqa"]:
        repeated = query.shape[-3] // key.shape[-3]
    query, key, value = (lead(walk, v, [], [len(v.shape) - 1]) for v in (query, key, value))
    rank = len(query.shape)
    for each in (query, key, value):
        walk.pin_axes(each, [rank - 2])
    dims = walk.tie(walk.axis(query, -1), walk.axis(key, -1))
    walk.reduce(dims)
    blocks = []
    for axis in range(rank - 2):
        heads = [walk.axis(v, axis) for v in (query, key, value) if v.shape[axis] > 1]
        if axis == rank - 3 and repeated > 1:
            heads[1:] = [None if h is None else np.repeat(h, repeated) for h in heads[1:]]
        tied = walk.tie(*heads, *_of_mask(walk, named["attn_mask"], rank - axis))
        if tied is not None:
            blocks.append(Block((axis,), tied))
    last = walk.axis(value, -1)
    if last is not None:
        blocks.append(Block((rank - 1,), last))
    _count_attention(walk, query, key, value, dims, last, blocks)
    return walk.made(out_shape(node), blocks)


def _of_mask(walk: Walk, mask: Any, from_end: int) -> list[np.ndarray | None]:
    if mask is None or len(walk.value(mask).shape) < from_end:
        return []
    value = walk.separate(walk.value(mask))
    value = walk.pin_axes(value, [len(value.shape) - 2, len(value.shape) - 1])
    axis = len(value.shape) - from_end
    return [walk.axis(value, axis)] if value.shape[axis] > 1 else []


def _count_attention(
    walk: Walk, query: Value, key: Value, value: Value, dims: Any, last: Any, blocks: list[Block]
) -> None:
    heads = {b.axes[0]: b.labels for b in blocks}
    leading = [heads.get(a) for a in range(len(query.shape) - 2)]
    area = query.shape[-2] * key.shape[-2]
    for labels, size in ((dims, query.shape[-1]), (last, value.shape[-1])):
        walk.count(area, *leading, labels, sizes=[*query.shape[:-2], size])


def rewrite_attention(cut: Cut, node: fx.Node) -> None:
    """The default scale is one over the root of the head's dimension, as it was."""
    named = arguments(node)
    if named["scale"] is None and cut.count(named["query"], -1) is not None:
        set_argument(node, "scale", cut.value(named["query"]).shape[-1] ** -0.5)
