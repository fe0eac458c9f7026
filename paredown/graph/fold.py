"""Batch norms folded into the layers before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.edit import aten, erase_counters
from paredown.graph.ops import argument
from paredown.graph.sites import Site, readers, sees_through, sites
from paredown.graph.state import getattr_or_none, remove_state, set_parameter, tensor_of


def fold_batch_norm(graph: fx.GraphModule) -> list[str]:
    """Fold each batch norm into the convolution or linear layer before it; returns their weights.

    ``w' = w * g / sqrt(v + eps)`` and ``b' = (b - m) * g / sqrt(v + eps) + beta`` per output
    channel (Jacob et al. 1712.05877, section 3.2). The graph must be in evaluation mode.
    """
    erase_counters(graph)
    reads = _reads(graph)
    folded = []
    for site in sites(graph):
        norm = next(iter(site.node.users), None)
        plain = site.kind in ("conv", "linear") or (
            site.kind == "conv_transpose" and argument(site.node, "groups") == 1
        )
        if (
            plain
            and norm is not None
            and len(site.node.users) == 1
            and norm.target is aten.batch_norm.default
            and norm.args[0] is site.node
            and norm.args[3] is not None
            and not norm.args[5]
            and reads[id(tensor_of(graph, site.weight))] == 1
            and _channels_match(site.kind, norm)
        ):
            own_bias = site.bias and reads[id(tensor_of(graph, site.bias))] == 1
            _fold(graph, site, norm, bool(own_bias))
            folded.append(site.weight)
    graph.recompile()
    return folded


def _channels_match(kind: str, norm: fx.Node) -> bool:
    """A linear layer's channels are the norm's only where its output is (B, C)."""
    value = norm.meta.get("val")
    return kind != "linear" or (isinstance(value, Tensor) and value.dim() == 2)


def _reads(graph: fx.GraphModule) -> dict[int, int]:
    """The id of a tensor -> how many ops read it, as it is or behind a fake quantizer."""
    return {
        held: sum(len(reader.users) if sees_through(reader) else 1 for reader in found)
        for held, found in readers(graph).items()
    }


def _fold(graph: fx.GraphModule, site: Site, norm: fx.Node, own_bias: bool) -> None:
    node, weight, bias, axis = site.node, site.weight, site.bias, site.axis
    operands = [arg if isinstance(arg, fx.Node) else None for arg in norm.args[1:5]]
    gamma, beta, mean, variance = (_double(graph, operand) for operand in operands)
    eps: Any = norm.args[7]
    w = tensor_of(graph, weight)
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + eps) * (1.0 if gamma is None else gamma)  # (C,)
    old = tensor_of(graph, bias).detach().double() if bias else torch.zeros_like(mean)
    shift = (old - mean) * scale + (0.0 if beta is None else beta)  # (C,)
    shape = [-1 if dim == axis else 1 for dim in range(w.dim())]
    with torch.no_grad():
        exact = torch.promote_types(w.dtype, torch.float32)
        w.copy_(w * scale.reshape(shape).to(exact))
    name = bias if bias and own_bias else _free_name(graph, weight)
    set_parameter(graph, name, shift.to(w.dtype))
    _set_bias(graph, node, name)
    if bias and name != bias:
        remove_state(graph, bias)
    norm.replace_all_uses_with(node)
    graph.graph.erase_node(norm)
    for operand in operands:
        if operand is not None and not operand.users:
            graph.graph.erase_node(operand)
            remove_state(graph, str(operand.target))
    assert operands[2] is not None
    prefix = str(operands[2].target).rpartition(".")[0]
    remove_state(graph, f"{prefix}.num_batches_tracked" if prefix else "num_batches_tracked")


def _double(graph: fx.GraphModule, operand: fx.Node | None) -> Tensor | None:
    return None if operand is None else tensor_of(graph, str(operand.target)).detach().double()


def _free_name(graph: fx.GraphModule, weight: str) -> str:
    stem, _, leaf = weight.rpartition(".")
    name = leaf.replace("weight", "bias") if "weight" in leaf else f"{leaf}_bias"
    full = f"{stem}.{name}" if stem else name
    while getattr_or_none(graph, full) is not None:
        full += "_folded"
    return full


def _set_bias(graph: fx.GraphModule, node: fx.Node, name: str) -> None:
    with graph.graph.inserting_before(node):
        bias = graph.graph.get_attr(name)
    args = list(node.args) + [None] * (3 - len(node.args))
    args[2] = bias
    node.args = tuple(args)
