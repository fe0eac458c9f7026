"""Binary and ternary weights in bytes: eight or four to one, and the op that unpacks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import keep_meta
from paredown.graph.holds.every import forget
from paredown.graph.parts import Parts
from paredown.graph.quantized.low_bits import LOW_BITS
from paredown.graph.quantized.rounding import spread
from paredown.graph.state import remove_state, set_buffer, tensor_of


def pack(integers: Tensor, bits: int) -> Tensor:
    """Signs (...) at one bit, a set one for 1, or -1, 0 and 1 at two, each plus one -> bytes
    (ceil(N * bits / 8),), uint8; the first weight lies lowest.

    Example:
        >>> pack(torch.tensor([1, -1, 1, 1]), 1), pack(torch.tensor([1, -1, 0]), 2)
        (tensor([13], dtype=torch.uint8), tensor([18], dtype=torch.uint8))
    """
    codes = (integers > 0 if bits == 1 else integers + 1).flatten().to(torch.uint8)
    groups = torch.nn.functional.pad(codes, (0, -len(codes) % (8 // bits))).view(-1, 8 // bits)
    return (groups << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """What `pack` has packed, in its shape, int8.

    Example:
        >>> unpack(pack(torch.tensor([[1, -1], [0, 0]]), 2), 2, (2, 2))
        tensor([[ 1, -1],
                [ 0,  0]], dtype=torch.int8)
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed[:, None] >> shifts) & (2**bits - 1)
    line = codes.flatten()[: torch.Size(shape).numel()].to(torch.int8)
    return (2 * line - 1 if bits == 1 else line - 1).reshape(tuple(shape))


@torch.library.custom_op("paredown::unpack", mutates_args=())
def unpack_weight(packed: Tensor, scale: Tensor, axis: int, bits: int, shape: list[int]) -> Tensor:
    """A weight from its packed signs and the scales (C,) of dimension ``axis``.

    Example:
        >>> packed = pack(torch.tensor([[1, -1], [-1, -1]]), 1)
        >>> unpack_weight(packed, torch.tensor([0.5, 2.0]), 0, 1, [2, 2])
        tensor([[ 0.5000, -0.5000],
                [-2.0000, -2.0000]])
    """
    integers = unpack(packed, bits, shape)
    return integers.to(scale.dtype) * spread(scale, integers, axis)


@unpack_weight.register_fake
def _(packed: Tensor, scale: Tensor, axis: int, bits: int, shape: list[int]) -> Tensor:
    return scale.new_empty(shape)


UNPACK = torch.ops.paredown.unpack.default


def pack_weights(model: Parts) -> None:
    """Put packed buffers and the op that unpacks them in the place of low-bit weights, in place;
    the graph computes the same numbers, and trains these weights no more."""
    graph = model.graph
    for node in [n for n in graph.graph.nodes if n.target in LOW_BITS]:
        source, axis = node.args
        assert isinstance(source, fx.Node) and isinstance(axis, int)
        name, kind = str(source.target), LOW_BITS[node.target]
        weight = tensor_of(graph, name).detach()
        data = pack(kind.integers(weight, axis), kind.bits)
        read = [
            _read(graph, node, f"{name}_packed", data),
            _read(graph, node, f"{name}_scale", kind.scales(weight, axis)),
        ]
        with graph.graph.inserting_before(node):
            arguments: Any = (*read, axis, kind.bits, list(weight.shape))
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
        for read in (packed, scale):
            if not read.users:
                graph.graph.erase_node(read)
                remove_state(graph, str(read.target))
    graph.recompile()


def _read(graph: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """A buffer of that name, and the node that reads it."""
    set_buffer(graph, name, value)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)
