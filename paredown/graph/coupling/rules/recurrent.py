"""LSTM, GRU and plain recurrent layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from paredown.graph.coupling.labels import Block, Result, Value, Walk, shape_of
from paredown.graph.coupling.rules.common import unknown
from paredown.graph.ops import arguments


def recurrent_layer(walk: Walk, node: fx.Node) -> Result:
    """Every layer and direction has the same hidden units: their states are one tensor."""
    named = arguments(node)
    if "input" not in named or "params" not in named:
        return unknown(walk, node)
    states = named["hx"] if isinstance(named["hx"], (list, tuple)) else [named["hx"]]
    directions = 2 if named["bidirectional"] else 1
    params = [walk.value(p) for p in named["params"]]
    per_layer = len(params) // (named["num_layers"] * directions)
    inputs = walk.separate(walk.value(named["input"]))
    fed = walk.axis(inputs, -1)
    inputs = walk.pin_axes(inputs, range(len(inputs.shape) - 1))
    hidden = walk.axis(params[1], 1)
    projected = per_layer in (3, 5)
    cell = walk.labels.fresh(params[1].shape[0] // 4) if projected else hidden
    outs = fed
    for layer in range(named["num_layers"]):
        for direction in range(directions):
            at = (layer * directions + direction) * per_layer
            _recurrent_layer(walk, params[at : at + per_layer], outs, hidden, cell, projected)
        outs = None if hidden is None else np.concatenate([hidden] * directions)
    for place, state in enumerate(states):
        value = walk.separate(walk.value(state))
        labels = walk.tie(walk.axis(value, -1), cell if place else hidden)
        if labels is not None:
            walk.pin_axes(value, range(len(value.shape) - 1))
    _count_recurrent(walk, node, params)
    return _recurrent_results(walk, node, outs, hidden, cell)


def _recurrent_layer(
    walk: Walk,
    params: list[Value],
    fed: np.ndarray | None,
    hidden: np.ndarray | None,
    cell: np.ndarray | None,
    projected: bool,
) -> None:
    walk.tie(walk.axis(params[0], 1), fed)
    walk.tie(walk.axis(params[1], 1), hidden)
    if projected:
        walk.tie(walk.axis(params[-1], 0), hidden)
        walk.tie(walk.axis(params[-1], 1), cell)
    for param in params[: len(params) - projected]:
        gates = walk.axis(param, 0)
        if gates is None or cell is None:
            walk.tie(gates, cell)
        else:
            walk.labels.union(gates.reshape(-1, len(cell)), cell[None])


def _count_recurrent(walk: Walk, node: fx.Node, params: list[Value]) -> None:
    shape = walk.value(node.args[0]).shape
    steps = math.prod(shape[:-1])
    for param in params:
        if len(param.shape) == 2:
            labels = [walk.axis(param, 0), walk.axis(param, 1)]
            walk.count(steps, *labels, sizes=param.shape)


def _recurrent_results(walk: Walk, node: fx.Node, outs: Any, hidden: Any, cell: Any) -> list[Value]:
    shapes = [shape_of(v) for v in node.meta["val"]]
    found = []
    for shape, labels in zip(shapes, (outs, hidden, cell), strict=False):
        blocks = [] if labels is None else [Block((len(shape) - 1,), labels)]
        found.append(walk.made(shape, blocks))
    return found


def recurrent_cell(walk: Walk, node: fx.Node) -> Result:
    named = arguments(node)
    states = named["hx"] if isinstance(named["hx"], (list, tuple)) else [named["hx"]]
    x, hidden = walk.value(named["input"]), walk.axis(walk.value(named["w_hh"]), 1)
    walk.tie(walk.axis(walk.separate(x), -1), walk.axis(walk.value(named["w_ih"]), 1))
    for state in states:
        walk.tie(walk.axis(walk.separate(walk.value(state)), -1), hidden)
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        if named[name] is not None:
            gates = walk.axis(walk.value(named[name]), 0)
            if gates is None or hidden is None:
                walk.tie(gates, hidden)
            else:
                walk.labels.union(gates.reshape(-1, len(hidden)), hidden[None])
    for name in ("w_ih", "w_hh"):
        param = walk.value(named[name])
        labels = [walk.axis(param, 0), walk.axis(param, 1)]
        walk.count(math.prod(x.shape[:-1]), *labels, sizes=param.shape)
    values = node.meta["val"]
    values = values if isinstance(values, (list, tuple)) else [values]
    found = []
    for value in values:
        blocks = [] if hidden is None else [Block((value.dim() - 1,), hidden)]
        found.append(walk.made(shape_of(value), blocks))
    return found if len(found) > 1 else found[0]
