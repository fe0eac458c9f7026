"""Products of matrices, and attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paredown.graph.doors.onnx.call import Call


def matmul(call: Call) -> Tensor:
    return torch.matmul(call.tensor(0), call.tensor(1))


def linear(call: Call) -> Tensor:
    """A product with a weight (outputs, inputs), as the patterns put it together."""
    return F.linear(call.tensor(0), call.tensor(1), call.maybe(2))


def gemm(call: Call) -> Tensor:
    a, b = call.tensor(0), call.tensor(1)
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    a = a.t() if call.attribute("transA", 0) else a
    b = b.t() if call.attribute("transB", 0) else b
    made = torch.mm(a, b)
    made = made if alpha == 1.0 else made * alpha
    if not call.has(2):
        return made
    c = call.tensor(2)
    return made + (c if beta == 1.0 else c * beta)


def fused_matmul(call: Call) -> Tensor:
    a, b, alpha = call.tensor(0), call.tensor(1), call.attribute("alpha", 1.0)
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise call.node.refused("turns the batches of its operands")
    a = a.transpose(-1, -2) if call.attribute("transA", 0) else a
    b = b.transpose(-1, -2) if call.attribute("transB", 0) else b
    made = torch.matmul(a, b)
    return made if alpha == 1.0 else made * alpha


def einsum(call: Call) -> Tensor:
    parts = [call.tensor(place) for place in range(len(call.values))]
    return torch.einsum(call.attribute("equation").replace(" ", ""), *parts)


def attended(call: Call) -> Tensor:
    """What a softmax of products became: queries, keys, values (..., T, E), and a mask."""
    q, k, v = (call.tensor(place) for place in range(3))
    mask, scale = call.maybe(3), call.attribute("scale")
    if not q.dim() == k.dim() == v.dim():
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores if mask is None else scores + mask, -1), v)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def attention(call: Call) -> Any:
    """ONNX's Attention of opset 23, without a cache."""
    q, k, v = (call.tensor(place) for place in range(3))
    flat = q.dim() == 3
    if flat:
        heads, groups = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
        q, k, v = _heads(q, heads), _heads(k, groups), _heads(v, groups)
    if call.has(4) or call.has(5) or call.has(6) or any(call.node.outputs[1:]):
        raise call.node.refused("keeps a cache of keys and values, or gives its products")
    if call.attribute("softcap", 0.0):
        raise call.node.refused("caps its products")
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    mask = call.maybe(3)
    causal = bool(call.attribute("is_causal", 0))
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        if mask is None:
            mask = ones
        elif mask.dtype is torch.bool:
            mask = mask & ones
        else:
            mask = torch.where(ones, mask, -math.inf)
        causal = False
    made = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=call.attribute("scale")
    )
    return made.transpose(1, 2).flatten(2) if flat else made


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads E) -> (B, heads, T, E)."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def multi_head_attention(call: Call) -> Any:
    """ONNX Runtime's, of separate queries, keys and values (B, T, heads E)."""
    if any(call.has(place) for place in range(4, len(call.values)) if place != 5):
        raise call.node.refused("has a padding mask, a cache, or lengths")
    if any(call.node.outputs[1:]) or not (call.has(1) and call.has(2)):
        raise call.node.refused("keeps a cache, or has its operands in one tensor")
    heads = call.attribute("num_heads")
    q, k, v = (call.tensor(place) for place in range(3))
    if call.has(3):
        bias = call.tensor(3).split([q.shape[2], k.shape[2], v.shape[2]])
        q, k, v = q + bias[0], k + bias[1], v + bias[2]
    q, k, v = (_heads(each, heads) for each in (q, k, v))
    made = F.scaled_dot_product_attention(
        q,
        k,
        v,
        call.maybe(5),
        scale=call.attribute("scale") or None,
        is_causal=bool(call.attribute("unidirectional", 0)),
    )
    return made.transpose(1, 2).flatten(2)


def joined_attention(call: Call) -> Any:
    """ONNX Runtime's Attention: the three projections in one weight (inputs, 3 heads E)."""
    if any(call.has(place) for place in range(4, len(call.values)) if place != 5):
        raise call.node.refused("has a cache")
    if any(call.node.outputs[1:]) or call.attribute("do_rotary", 0):
        raise call.node.refused("keeps a cache, or turns its keys")
    x, heads = call.tensor(0), call.attribute("num_heads")
    joined = F.linear(x, call.tensor(1).t(), call.maybe(2))
    sizes = call.attribute("qkv_hidden_sizes") or [joined.shape[2] // 3] * 3
    q, k, v = (_heads(each, heads) for each in joined.split(list(sizes), 2))
    mask = None
    if call.has(3):
        given = call.tensor(3)
        if given.dim() != 2:
            raise call.node.refused("has a mask that is no padding (batch, length)")
        mask = given.bool()[:, None, None, :]
    scale = call.attribute("scale") or None
    causal = bool(call.attribute("unidirectional", 0))
    if causal and mask is not None:
        raise call.node.refused("has both a padding mask and one of the past")
    made = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    return made.transpose(1, 2).flatten(2)


def rotary(call: Call) -> Tensor:
    """RotaryEmbedding of opset 23: pairs of numbers turned by an angle of their place."""
    x, cos, sin = call.tensor(0), call.tensor(1), call.tensor(2)
    flat = x.dim() == 3
    if flat:
        x = _heads(x, call.attribute("num_heads"))
    if call.has(3):
        places = call.tensor(3)
        cos, sin = F.embedding(places, cos), F.embedding(places, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, E / 2)
    width = call.attribute("rotary_embedding_dim", 0) or x.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if call.attribute("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        made = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    made = torch.cat((made, rest), -1) if width != x.shape[-1] else made
    return made.transpose(1, 2).flatten(2) if flat else made


TABLE: dict[str, Callable[[Call], Any]] = {
    **{"MatMul": matmul, "Gemm": gemm, "Einsum": einsum, "paredown.Linear": linear},
    **{"paredown.Attention": attended, "Attention": attention, "RotaryEmbedding": rotary},
    "com.microsoft.FusedMatMul": fused_matmul,
    "com.microsoft.MultiHeadAttention": multi_head_attention,
    "com.microsoft.Attention": joined_attention,
}
