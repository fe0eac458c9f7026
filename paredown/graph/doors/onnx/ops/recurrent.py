"""Recurrent layers, one for each node, as PyTorch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.graph.doors.onnx.call import Call

USUAL = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def layer(call: Call) -> tuple[Tensor, ...]:
    """Weights as `patterns.recurrent` laid them out: for each direction those of the inputs, those
    of the states, and a bias of each; then the first states, where the file gives any."""
    x = call.tensor(0)  # (T, B, F)
    kind = call.attribute("kind")
    ways = call.attribute("ways")
    biased, width = call.attribute("biased"), call.attribute("hidden_size")
    count = ways * (4 if biased else 2)
    weights = [call.tensor(place) for place in range(1, 1 + count)]
    if call.attribute("layout", 0):
        x = x.transpose(0, 1)
    states = [
        _state(call, x, 1 + count + n, ways, width) for n in range(2 if kind == "LSTM" else 1)
    ]
    options = (biased, 1, 0.0, call.training, ways == 2, False)
    if kind == "LSTM":
        made, last, cell = torch.lstm(x, states, weights, *options)
    elif kind == "GRU":
        made, last = torch.gru(x, states[0], weights, *options)
    else:
        function = torch.rnn_relu if call.attribute("relu") else torch.rnn_tanh
        made, last = function(x, states[0], weights, *options)
    if call.attribute("flat"):  # (T, B, ways H), which the file goes on with
        y = made
    else:
        y = made.unflatten(2, (ways, width)).transpose(1, 2)  # (T, ways, B, H)
    found = [y, last, cell] if kind == "LSTM" else [y, last]
    if call.attribute("layout", 0):
        found[0] = y.movedim(2, 0)
        found[1:] = [each.transpose(0, 1) for each in found[1:]]
    return tuple(found)


def _state(call: Call, x: Tensor, place: int, ways: int, width: int) -> Tensor:
    if not call.has(place):
        return x.new_zeros(ways, x.shape[1], width)
    found = call.tensor(place)
    return found.transpose(0, 1) if call.attribute("layout", 0) else found


TABLE: dict[str, Callable[[Call], Any]] = {"paredown.Recurrent": layer}
