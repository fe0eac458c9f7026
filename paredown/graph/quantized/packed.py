"""Binary and ternary weights in bytes: eight or four to one, and the op that unpacks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import keep_meta
from paredown.graph.holds.every import forget
from paredown.graph.parts import Parts
from paredown.graph.quantized.forms import WEIGHT_FORMS, Form, form_of
from paredown.graph.quantized.quantizers import read
from paredown.graph.quantized.rounding import spread
from paredown.graph.state import remove_state, set_buffer, tensor_of


@torch.library.custom_op("paredown::unpack", mutates_args=())
def unpack_weight(packed: Tensor, scale: Tensor, axis: int, bits: int, shape: list[int]) -> Tensor:
    """A weight from its packed signs and the scales (C,) of dimension ``axis``.

    Example:
        >>> packed = packed_form(1).pack(torch.tensor([[1, -1], [-1, -1]]))
        >>> unpack_weight(packed, torch.tensor([0.5, 2.0]), 0, 1, [2, 2])
        tensor([[ 0.5000, -0.5000],
                [-2.0000, -2.0000]])
    """
    integers = packed_form(bits).unpack(packed, shape)
    return integers.to(scale.dtype) * spread(scale, integers, axis)


@unpack_weight.register_fake
def _(packed: Tensor, scale: Tensor, axis: int, bits: int, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


def packed_form(bits: int) -> Form:
    """The form of so many bits whose weights `pack_weights` packs."""
    return next(form for form in WEIGHT_FORMS.values() if form.follows and form.bits == bits)


UNPACK = torch.ops.paredown.unpack.default


def pack_weights(model: Parts) -> None:
    """Put packed buffers and the op that unpacks them in the place of low-bit weights, in place;
    the graph computes the same numbers, and trains these weights no more."""
    graph = model.graph
    for node in list(graph.graph.nodes):
        form = form_of(node)
        if form is None or not form.follows:
            continue
        weight = read(graph, node)
        name = weight.name
        held = [
            _read(graph, node, f"{name}_packed", form.pack(weight.shaped())),
            _read(graph, node, f"{name}_scale", weight.scales[:, 0]),
        ]
        with graph.graph.inserting_before(node):
            arguments: Any = (*held, weight.axis, form.bits, list(weight.weight.shape))
            made = graph.graph.call_function(UNPACK, arguments)
        keep_meta(made, node)
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        remove_state(graph, name)
        forget(model, name)
    graph.recompile()


def unpack_weights(model: Parts) -> None:
    """Put plain weights in the place of packed ones, in place, so that none is unpacked twice."""
    graph = model.graph
    for node in [n for n in graph.graph.nodes if n.target is UNPACK]:
        packed, scale, *rest = node.args
        assert isinstance(packed, fx.Node) and isinstance(scale, fx.Node)
        weight = UNPACK(*(tensor_of(graph, str(n.target)) for n in (packed, scale)), *rest)
        name = str(packed.target).removesuffix("_packed")
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(_read(graph, node, name, weight))
        graph.graph.erase_node(node)
        for each in (packed, scale):
            if not each.users:
                graph.graph.erase_node(each)
                remove_state(graph, str(each.target))
    graph.recompile()


def _read(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer of that name, and the node that reads it."""
    set_buffer(graph, name, value)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)
