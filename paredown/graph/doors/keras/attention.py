"""Attention, whose projections Keras has as einsums over heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from paredown.graph.doors.keras.value import Layer, Value, parameter, set_to, whole


class Attention(nn.Module):
    """Query, value and key (B, length, features) -> (B, length, features)."""

    def __init__(self, heads: int, causal: bool, dropout: float, **projections: nn.Linear) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        for name, projection in projections.items():
            self.add_module(name, projection)

    def forward(self, query: Value, value: Value, key: Value | None = None) -> Value:
        given = {"query": query, "key": value if key is None else key, "value": value}
        q, k, v = (self._split(name, each.last().tensor) for name, each in given.items())
        rate = self.dropout if self.training else 0.0
        made = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=self.causal)
        return Value(self.get_submodule("output")(made.transpose(1, 2).flatten(2)))

    def _split(self, name: str, x: Tensor) -> Tensor:
        made: Tensor = self.get_submodule(name)(x)  # (B, length, heads x size)
        return made.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _projection(dense: Any, is_output: bool = False) -> nn.Linear:
    """Of an einsum (in, heads, size), or (heads, size, out) behind the attention."""
    kernel = parameter(dense.kernel)
    kernel = kernel.flatten(0, 1) if is_output else kernel.flatten(1)
    made = nn.Linear(kernel.shape[0], kernel.shape[1], bias=dense.bias is not None)
    set_to(made.weight, kernel.T)
    if dense.bias is not None:
        set_to(made.bias, parameter(dense.bias).flatten())
    return made


def attention(layer: Any, causal: bool = False) -> Layer | None:
    parts = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    if len(parts[3].kernel.shape) != 3 or len(parts[0].kernel.shape) != 3:
        return None
    plain = all(getattr(each, "quantization_mode", None) is None for each in parts)
    axes = layer.attention_axes
    if not plain or (axes is not None and tuple(axes) not in ((1,), (-2,))):
        return None
    if getattr(layer, "_use_gate", False):
        return None
    names = ("query", "key", "value")
    projections = {name: _projection(part) for name, part in zip(names, parts[:3], strict=True)}
    projections["output"] = _projection(parts[3], is_output=True)
    return whole(Attention(layer.num_heads, causal, float(layer.dropout), **projections))


TABLE: dict[str, Callable[[Any], Layer | None]] = {"MultiHeadAttention": attention}
