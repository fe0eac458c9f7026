"""Recurrent layers, one for each node, as PyTorch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paredown.graph.doors.onnx.call import Call

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


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
    _check(kind, x, weights, states, (ways, width), biased)
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


def _check(
    kind: str,
    x: Tensor,
    weights: list[Tensor],
    states: list[Tensor],
    size: tuple[int, int],
    biased: bool,
) -> None:
    """PyTorch's own ops read beyond tensors of other sizes, and take the process with them.

    Args:
        size: directions, and the width of the state.
    """
    ways, width = size
    rows = GATES[kind] * width
    if x.dim() != 3:
        raise ValueError(f"expected inputs of 3 dimensions, got {x.dim()}")
    wanted: list[tuple[Any, ...]] = [(rows, x.shape[2]), (rows, width)]
    wanted += [(rows,), (rows,)] if biased else []
    wanted = [*wanted * ways, *[(ways, x.shape[1], width)] * len(states)]
    for expected, each in zip(wanted, [*weights, *states], strict=True):
        if len(each.shape) != len(expected) or any(
            one != other for one, other in zip(each.shape, expected, strict=True)
        ):
            raise ValueError(f"expected a tensor of {expected}, got {tuple(each.shape)}")


def _state(call: Call, x: Tensor, place: int, ways: int, width: int) -> Tensor:
    if not call.has(place):
        return x.new_zeros(ways, x.shape[1], width)
    found = call.tensor(place)
    return found.transpose(0, 1) if call.attribute("layout", 0) else found


TABLE: dict[str, Callable[[Call], Any]] = {"paredown.Recurrent": layer}
