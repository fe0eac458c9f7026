"""Recurrent layers as the exporter sees them: their shapes alone, which any length has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._decomp import decompositions


@contextlib.contextmanager
def any_length() -> Iterator[None]:
    """While a program is traced: PyTorch finds the shapes of a recurrent layer by going through
    its time steps one by one, and so takes their number for fixed, though the layer stays one op
    of the graph. Nothing is computed with what these give."""
    found = {name: getattr(decompositions, name) for name in LAYERS}
    try:
        for name, shaped in LAYERS.items():
            setattr(decompositions, name, shaped)
        yield
    finally:
        for name, there in found.items():
            setattr(decompositions, name, there)


def _layer(inp: Tensor, hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """inp (T, B, F), hidden (B, H) -> all states (T, B, H), the last (B, H)."""
    return inp.new_empty(inp.shape[0], *hidden.shape), hidden.clone()


def _lstm_layer(
    inp: Tensor, hidden: tuple[Tensor, Tensor], *_: Any, **__: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The same of an LSTM, whose state is two: (B, H or its projection) and (B, H)."""
    states, last = _layer(inp, hidden[0])
    return states, (last, hidden[1].clone())


LAYERS = {"one_layer_rnn": _layer, "one_layer_lstm": _lstm_layer}
