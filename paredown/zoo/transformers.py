"""Small transformers: encoders as BERT's miniatures are (1908.08962), decoders as GPT-2 is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.zoo.blocks import divisible

HEAD = 64  # channels of an attention head, where the width has so many
SIZES = {"tiny": (128, 2), "mini": (256, 4), "small": (512, 4), "medium": (512, 8)}  # width, depth


class Attention(nn.Module):
    """Attention of several heads.

    Shapes: x (B, T, width), mask (B, 1, 1, T) or None -> (B, T, width).
    """

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD)
        self.causal = causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = (self.query(x), self.key(x), self.value(x))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        causal = self.causal and mask is None
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(made.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and two linear layers; norms before them in decoders, behind them in encoders.

    Shapes: (B, T, width) -> (B, T, width).
    """

    def __init__(self, width: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, causal), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.before = causal

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.before:
            x = x + self.dropout(self.attention(self.norm1(x), mask))
            return x + self.dropout(self._wide(self.norm2(x)))  # type: ignore[no-any-return]
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self._wide(x)))  # type: ignore[no-any-return]

    def _wide(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Tokens -> classes of the whole, or of each.

    Shapes: tokens (B, T) integers, mask (B, T), 0 where a token is padding, or None ->
    (B, classes), or (B, T, classes) where it is not ``pooled``.

    Args:
        length: tokens at most.
        causal: whether a token sees those before it alone, and the classes are the vocabulary,
            whose table is used again for them.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        width: int,
        depth: int,
        length: int = 512,
        causal: bool = False,
        pooled: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, causal, dropout) for _ in range(depth))
        self.pool = nn.Linear(width, width) if pooled else None
        tied = causal and classes == vocabulary
        self.head = nn.Linear(width, classes, bias=not tied)
        self.causal = causal
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Embedding)):
                nn.init.normal_(layer.weight, 0, 0.02)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:length]  # (B, T, width)
        x = self.dropout(x if self.causal else self.norm(x))
        seen = None if mask is None else mask[:, None, None, :] != 0  # (B, 1, 1, T)
        if seen is not None and self.causal:
            seen = seen & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        for layer in self.layers:
            x = layer(x, seen)
        x = self.norm(x) if self.causal else x
        if self.pool is not None:
            x = torch.tanh(self.pool(x[:, 0]))
        return self.head(x)  # type: ignore[no-any-return]


def transformer(
    kind: str,
    vocabulary: int,
    classes: int,
    causal: bool,
    width: float = 1.0,
    depth: float = 1.0,
    length: int = 512,
    pooled: bool = True,
) -> Transformer:
    """One of `SIZES`, its width and depth multiplied."""
    whole, deep = SIZES[kind]
    scaled = whole * width
    wide = divisible(scaled, HEAD if scaled >= HEAD else 8)
    layers = max(1, round(deep * depth))
    return Transformer(vocabulary, classes, wide, layers, length, causal, pooled)
