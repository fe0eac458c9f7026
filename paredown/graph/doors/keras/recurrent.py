"""Recurrent layers, whose gates Keras has in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paredown.graph.doors.keras.value import Layer, Value, parameter, set_to

# Keras's gates in torch's order: input, forget, cell, output; reset, update, new.
GATES = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "SimpleRNN": (0,)}
KINDS: dict[str, Any] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "SimpleRNN": nn.RNN}


@dataclass(frozen=True)
class Steps:
    """(B, length, features) -> all steps, or the last of each direction.

    Attributes:
        turns: whether a single direction reads from the end on.
        dropout: of what comes in, in training.
    """

    whole: bool
    turns: bool = False
    dropout: float = 0.0

    def __call__(self, module: Any, value: Value) -> Value:
        x = value.last().tensor
        x = functional.dropout(x, self.dropout, module.training) if self.dropout else x
        steps, _ = module(x.flip(1) if self.turns else x)
        if self.whole:
            return Value(steps)
        if module.bidirectional:
            size = module.hidden_size
            return Value(torch.cat([steps[:, -1, :size], steps[:, 0, size:]], dim=-1))
        return Value(steps[:, -1])


def _taken(layer: Any) -> bool:
    """Whether torch's own layer computes what this one does."""
    name = type(layer).__name__
    if name not in KINDS or layer.stateful or layer.return_state:
        return False
    if getattr(layer, "recurrent_dropout", 0):
        return False
    if name == "SimpleRNN":
        return layer.activation.__name__ in ("tanh", "relu")
    usual = (layer.activation.__name__, layer.recurrent_activation.__name__) == ("tanh", "sigmoid")
    return usual and (name == "LSTM" or layer.reset_after)


def _made(layer: Any, size: int, both: bool) -> Any:
    how = {"batch_first": True, "bidirectional": both}
    if type(layer).__name__ == "SimpleRNN":
        how["nonlinearity"] = layer.activation.__name__
    return KINDS[type(layer).__name__](size, layer.units, **how)


def _fill(made: Any, layer: Any, suffix: str) -> None:
    order, units = GATES[type(layer).__name__], layer.units

    def gates(weight: Tensor) -> Tensor:  # (..., gates x units), in Keras's order
        parts = weight.split(units, dim=-1)
        return torch.cat([parts[place] for place in order], dim=-1)

    cell = layer.cell
    set_to(getattr(made, f"weight_ih_l0{suffix}"), gates(parameter(cell.kernel)).T)
    set_to(getattr(made, f"weight_hh_l0{suffix}"), gates(parameter(cell.recurrent_kernel)).T)
    first, second = (getattr(made, f"bias_{each}_l0{suffix}") for each in ("ih", "hh"))
    bias = parameter(cell.bias) if cell.use_bias else torch.zeros_like(first)
    parts = list(bias) if bias.dim() == 2 else [bias, torch.zeros_like(bias)]
    set_to(first, gates(parts[0]))
    set_to(second, gates(parts[1]))


def recurrent(layer: Any) -> Layer | None:
    if not _taken(layer):
        return None
    made = _made(layer, layer.cell.kernel.shape[0], both=False)
    _fill(made, layer, "")
    return Layer(made, Steps(layer.return_sequences, layer.go_backwards, _dropout(layer)))


def both_ways(layer: Any) -> Layer | None:
    forward, backward = layer.forward_layer, layer.backward_layer
    if layer.merge_mode != "concat" or not (_taken(forward) and _taken(backward)):
        return None
    same = type(forward) is type(backward) and forward.units == backward.units
    if not same or forward.go_backwards or not backward.go_backwards:
        return None
    made = _made(forward, forward.cell.kernel.shape[0], both=True)
    _fill(made, forward, "")
    _fill(made, backward, "_reverse")
    return Layer(made, Steps(forward.return_sequences, dropout=_dropout(forward)))


def _dropout(layer: Any) -> float:
    return float(getattr(layer, "dropout", 0) or 0)


TABLE: dict[str, Callable[[Any], Layer | None]] = {
    **dict.fromkeys(KINDS, recurrent),
    "Bidirectional": both_ways,
}
