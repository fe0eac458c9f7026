"""Recurrent layers for ExecuTorch, which has no kernels of its own for them.

It would unroll them over the example's length into products that XNNPACK does not take. Here they
become linear layers, one for each step, which it takes: with integer weights each rounds the rows
that come to it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx

from paredown.graph.model import Model
from paredown.graph.quantized.decomposed import DEQUANTIZE_CHANNEL
from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.quantizers import read
from paredown.graph.state import tensor_of
from paredown.targets.formats import rowwise
from paredown.targets.formats.rowwise import add_before, args_of, hold_before, shape_of

T = TypeVar("T")
aten = torch.ops.aten
LSTM, GRU = aten.lstm.input, aten.gru.input
RECURRENT = (LSTM, GRU, aten.rnn_tanh.input, aten.rnn_relu.input)
ACTIVATIONS: dict[Any, Any] = {
    aten.rnn_tanh.input: aten.tanh.default,
    aten.rnn_relu.input: aten.relu.default,
}


def at_one_length(model: Model) -> Model:
    """The model with nothing but its batch varying, where it has a recurrent layer: ExecuTorch
    writes one as so many steps as the example has."""
    if not any(node.target in RECURRENT for node in model.graph.graph.nodes):
        return model
    inputs = tuple(
        replace(item, dynamic=_batch_alone(item.dynamic), limits=_batch_alone(item.limits))
        for item in model.inputs
    )
    return replace(model, inputs=inputs)


def _batch_alone(dims: dict[int, T]) -> dict[int, T]:
    return {dim: of for dim, of in dims.items() if dim == 0}


def unroll(model: Model) -> None:
    """Each recurrent op as linear layers, step by step, in place.

    Where it has a projection it stays, and its weights are floats.
    """
    graph = model.graph
    for node in [node for node in graph.graph.nodes if node.target in RECURRENT]:
        weights = args_of(node)[2]
        if len(weights) == _tensors(node) and all(_fits(graph, w) for w in weights):
            _unroll(node)
        else:
            for weight in [each for each in weights if each.target is DEQUANTIZE_CHANNEL]:
                _restore(graph, node, weight)


def _fits(graph: fx.GraphModule, weight: fx.Node) -> bool:
    """Whether a kernel reads it as it lies."""
    return weight.target is not PER_GROUP or rowwise.fits(read(graph, weight))


def _tensors(node: fx.Node) -> int:
    """Matrices and biases of one layer in one direction, where there is no projection."""
    return (4 if args_of(node)[3] else 2) * args_of(node)[4] * (2 if args_of(node)[7] else 1)


def _restore(graph: fx.GraphModule, node: fx.Node, weight: fx.Node) -> None:
    """Put the floats that it stands for in the place of a weight."""
    integers, scale, zeros, *rest = args_of(weight)
    tensors = [tensor_of(graph, str(each.target)) for each in (integers, scale, zeros)]
    floats = DEQUANTIZE_CHANNEL(*tensors, *rest)
    node.replace_input_with(weight, hold_before(graph, node, f"{integers.target}_restored", floats))
    if not weight.users:
        graph.graph.erase_node(weight)


def _unroll(node: fx.Node) -> None:
    x, state, weights, biases, layers, _, _, both, batch_first = args_of(node)
    states = state if node.target is LSTM else [state]
    time, each = (1 if batch_first else 0), (4 if biases else 2)
    length, lasts = shape_of(x)[time], list[list[fx.Node]]()
    for _ in range(layers):
        made = []
        for backwards in (False, True)[: 2 if both else 1]:
            place = len(lasts)
            mine = weights[place * each : (place + 1) * each]
            first = [add_before(node, aten.select.int, one, 0, place) for one in states]
            steps = range(length)[::-1] if backwards else range(length)
            outputs, last = _one_way(node, x, mine, first, time, steps)
            made.append(add_before(node, aten.stack.default, outputs, time))
            lasts.append(last)
        x = made[0] if len(made) == 1 else add_before(node, aten.cat.default, made, -1)
    stacked = [add_before(node, aten.stack.default, [*e], 0) for e in zip(*lasts, strict=True)]
    for pick in list(node.users):
        rowwise.replace_by(pick, [x, *stacked][args_of(pick)[1]])
    node.graph.erase_node(node)


def _one_way(
    node: fx.Node,
    x: fx.Node,
    weights: Sequence[fx.Node],
    states: list[fx.Node],
    time: int,
    steps: Sequence[int],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """One layer in one direction: the outputs (B, H) by place in time, and the last states."""
    inputs, recurrent, *biases = weights
    given = add_before(node, aten.linear.default, x, inputs, *biases[:1])
    outputs: dict[int, fx.Node] = {}
    for step in steps:
        now = add_before(node, aten.select.int, given, time, step)
        again = add_before(node, aten.linear.default, states[0], _again(recurrent), *biases[1:])
        states = STEPS.get(node.target, _plain_step)(node, now, again, states)
        outputs[step] = states[0]
    return [outputs[step] for step in sorted(outputs)], states


def _again(weight: fx.Node) -> fx.Node:
    """A dequantize op of its own for each linear layer, so that the two can go to one kernel."""
    if weight.target is not DEQUANTIZE_CHANNEL:
        return weight
    with weight.graph.inserting_after(weight):
        return weight.graph.node_copy(weight)


def _lstm_step(node: fx.Node, x: fx.Node, h: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
    i, f, g, o = _parts(node, add_before(node, aten.add.Tensor, x, h), 4)
    i, f, o = (add_before(node, aten.sigmoid.default, each) for each in (i, f, o))
    kept = add_before(node, aten.mul.Tensor, f, states[1])
    new = add_before(node, aten.mul.Tensor, i, add_before(node, aten.tanh.default, g))
    cell = add_before(node, aten.add.Tensor, kept, new)
    out = add_before(node, aten.mul.Tensor, o, add_before(node, aten.tanh.default, cell))
    return [out, cell]


def _gru_step(node: fx.Node, x: fx.Node, h: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
    xs, hs = _parts(node, x, 3), _parts(node, h, 3)
    reset, update = (
        add_before(node, aten.sigmoid.default, add_before(node, aten.add.Tensor, a, b))
        for a, b in zip(xs[:2], hs[:2], strict=True)
    )
    held = add_before(node, aten.mul.Tensor, reset, hs[2])
    new = add_before(node, aten.tanh.default, add_before(node, aten.add.Tensor, xs[2], held))
    moved = add_before(node, aten.sub.Tensor, states[0], new)
    return [
        add_before(node, aten.add.Tensor, new, add_before(node, aten.mul.Tensor, update, moved))
    ]


def _plain_step(node: fx.Node, x: fx.Node, h: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
    return [add_before(node, ACTIVATIONS[node.target], add_before(node, aten.add.Tensor, x, h))]


def _parts(node: fx.Node, value: fx.Node, count: int) -> list[fx.Node]:
    """The gates (B, H) of (B, G H)."""
    made = add_before(node, aten.chunk.default, value, count, -1)
    return [add_before(node, operator.getitem, made, place) for place in range(count)]


STEPS: dict[Any, Any] = {LSTM: _lstm_step, GRU: _gru_step}
