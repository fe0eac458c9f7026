"""Run a captured graph and keep some of its inner values on the way."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.interpret import Note, Pass, Rule

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)


def attention_map(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Where each query looks: the probabilities inside `scaled_dot_product_attention`.

    Shapes: query (B, heads, L, D), key (B, heads or a divisor of it, S, D), mask of bool (True
    takes part) or of float (added) -> (B, heads, L, S).

    Example:
        >>> q = torch.zeros(1, 1, 2, 4)
        >>> attention_map(q, q, causal=True)[0, 0].tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    if key.dim() > 2 and key.shape[-3] != query.shape[-3]:  # grouped queries
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    least = torch.finfo(scores.dtype).min / 2  # minus infinity would leave NaN in a row of nothing
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, least)
    elif mask is not None:
        scores = (scores + mask).clamp(min=least)
    return scores.softmax(-1)


def _tapping(note: Note, wanted: Collection[str] | None = None) -> Rule:
    """``note`` is called with each wanted node and its value; of an attention op, with its map."""

    def rule(run: Pass, node: fx.Node) -> Any:
        noted = wanted is None or node.name in wanted
        seen = _map_of(*run.arguments(node)) if noted and _attends(node) else None
        value = run.compute(node)
        if noted:
            note(node, value if seen is None else seen)
        return value

    return rule


def _attends(node: fx.Node) -> bool:
    return node.target is ATTENTION


def _map_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    return attention_map(
        given["query"],
        given["key"],
        given.get("attn_mask"),
        given.get("is_causal", False),
        given.get("scale"),
    )


def walk(graph: fx.GraphModule, leaves: Sequence[Tensor], note: Note) -> None:
    """Run the graph on copies of its inputs; every node is noted with its value."""
    Pass(graph, _tapping(note)).outputs(leaves)


def read(
    graph: fx.GraphModule, leaves: Sequence[Tensor], names: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs' tensors, and the values of the nodes of these names.

    Example:
        >>> import paredown
        >>> model = paredown.capture(torch.nn.Sequential(torch.nn.ReLU()), (torch.zeros(1, 2),))
        >>> read(model.graph, [torch.tensor([[-1.0, 2.0]])], ["relu"])
        ([tensor([[0., 2.]])], [tensor([[0., 2.]])])
    """
    if not names:
        return list(graph(*leaves)), []
    found: dict[str, Tensor] = {}
    rule = _tapping(lambda node, value: found.update({node.name: value}), set(names))
    outputs = Pass(graph, rule).run(*leaves)
    return list(outputs), [found[name] for name in names]
