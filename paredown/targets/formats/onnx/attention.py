"""Attention on any number of axes, as the exporter takes it: (batch, heads, length, size)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paredown.graph.edit import insert_after
from paredown.graph.model import Model
from paredown.graph.ops import argument
from paredown.graph.values import give_values
from paredown.targets.formats.rowwise import add_before, args_of, shape_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
AXES = 4


def on_four_axes(model: Model) -> Model:
    """A copy whose attention is on four axes, the axes before the heads made one; a model that has
    no other attention as it is."""
    known = model
    if any("val" not in node.args[0].meta for node in _attentions(model)):
        known = model.copy()
        give_values(known)
    if not _others(known):
        return model
    made = known.copy()
    for node in _others(made):
        _reshape(node)
    made.graph.graph.lint()
    made.graph.recompile()
    return made


def _attentions(model: Model) -> list[Any]:
    return [node for node in model.graph.graph.nodes if node.target is ATTENTION]


def _others(model: Model) -> list[fx.Node]:
    return [node for node in _attentions(model) if len(shape_of(node.args[0])) != AXES]


def _reshape(node: fx.Node) -> None:
    query, mask = args_of(node)[0], argument(node, "attn_mask")
    axes = len(shape_of(query))
    before = list(range(axes - AXES + 1))  # the axes that become the batch
    sizes = [add_before(node, aten.sym_size.int, query, dim) for dim in before]
    if isinstance(mask, fx.Node) and before and len(shape_of(mask)) >= AXES:
        whole = add_before(node, aten.expand.default, mask, [*sizes, -1, -1, -1])
        node.replace_input_with(mask, _flat(node, whole, before))
    for position in range(3):
        node.update_arg(position, _flat(node, args_of(node)[position], before))
    if before:
        insert_after(node, aten.unflatten.int, (0, sizes))
    for _ in range(AXES - axes):
        insert_after(node, aten.squeeze.dim, (0,))


def _flat(node: fx.Node, value: fx.Node, before: Sequence[int]) -> fx.Node:
    if before:
        return add_before(node, aten.flatten.using_ints, value, 0, before[-1])
    axes = len(shape_of(value))
    for _ in range(AXES - axes):
        value = add_before(node, aten.unsqueeze.default, value, 0)
    return value
