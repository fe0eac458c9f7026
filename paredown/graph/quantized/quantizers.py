"""The one quantized form: a graph whose tensors pass through fake quantizers.

A fake quantizer rounds to an integer grid and comes back to float, so that the graph still runs,
trains (straight-through gradient, Bengio 1308.3432) and keeps its parameters; a runtime's
``lower`` turns each into the quantize and dequantize ops, and each weight into the integers, that
its kernels fuse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from paredown.graph.quantized.grouped import PER_GROUP
from paredown.graph.quantized.low_bits import BINARY, LOW_BITS, raised
from paredown.graph.quantized.rounding import affine_of, on_grid, round_to_grid, spread
from paredown.graph.quantized.scales import least_scales
from paredown.graph.sites import Site, sites
from paredown.graph.state import set_buffer, tensor_of


@torch.library.custom_op("paredown::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """One scale for the tensor: ``scale * (clamp(round(x / scale) + zero_point, low, high) -
    zero_point)`` (Jacob et al. 1712.05877); shape kept.

    Example:
        >>> fake_quantize(torch.tensor([0.04, 0.26, 9.0]), 0.1, 0, 0, 10)
        tensor([0.0000, 0.3000, 1.0000])
    """
    return on_grid(x, scale, zero_point, low, high)


@fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("paredown::fake_quantize_channel", mutates_args=())
def fake_quantize_channel(x: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Tensor:
    """One scale (C,) for each index of dimension ``axis``, symmetric; shape kept.

    Example:
        >>> scale = torch.tensor([0.1, 0.2])
        >>> fake_quantize_channel(torch.tensor([[0.26], [0.26]]), scale, 0, -8, 7)
        tensor([[0.3000],
                [0.2000]])
    """
    return on_grid(x, spread(scale, x, axis), 0, low, high)


@fake_quantize_channel.register_fake
def _(x: Tensor, scale: Tensor, axis: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("paredown::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor, low: int, high: int) -> Tensor:
    """One scale and zero point for the tensor, which span its own values and 0; shape kept.

    Example:
        >>> fake_quantize_dynamic(torch.tensor([0.0, 0.26, 1.0]), 0, 10)
        tensor([0.0000, 0.3000, 1.0000])
    """
    if not x.numel():
        return x.clone()
    return on_grid(x, *affine_of(x, low, high), low, high)


@fake_quantize_dynamic.register_fake
def _(x: Tensor, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


def _save_inside(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(round_to_grid(*inputs)[1])


def _straight_through(ctx, grad):  # type: ignore[no-untyped-def]
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None, None


def _save_inside_channel(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, scale, axis, low, high = inputs
    ctx.save_for_backward(round_to_grid(x, spread(scale, x, axis), 0, low, high)[1])


def _straight_through_all(ctx, grad):  # type: ignore[no-untyped-def]
    return grad, None, None


fake_quantize_dynamic.register_autograd(_straight_through_all)
fake_quantize.register_autograd(_straight_through, setup_context=_save_inside)
fake_quantize_channel.register_autograd(_straight_through, setup_context=_save_inside_channel)

PER_TENSOR = torch.ops.paredown.fake_quantize.default
DYNAMIC = torch.ops.paredown.fake_quantize_dynamic.default
PER_CHANNEL = torch.ops.paredown.fake_quantize_channel.default

ACTIVATION_QUANTIZERS = frozenset({PER_TENSOR, DYNAMIC})
# Each takes the weight first, and what it needs to round it after that.
WEIGHT_QUANTIZERS = frozenset({PER_CHANNEL, PER_GROUP, *LOW_BITS})


def quantizers(graph: fx.GraphModule) -> list[fx.Node]:
    """The fake quantizers of a graph, in the order it runs them; none where it is in float."""
    both = ACTIVATION_QUANTIZERS | WEIGHT_QUANTIZERS
    return [node for node in graph.graph.nodes if node.target in both]


def quantized_weights(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Parameter name -> the fake quantizer it passes through."""
    return {
        str(node.args[0].target): node
        for node in graph.graph.nodes
        if node.target in WEIGHT_QUANTIZERS and isinstance(node.args[0], fx.Node)
    }


def stored_bits(quantizer: fx.Node) -> int:
    """Bits that one weight behind this quantizer takes in a file.

    Example:
        >>> graph = fx.Graph()
        >>> weight, scale = graph.placeholder("weight"), graph.placeholder("scale")
        >>> [stored_bits(graph.call_function(PER_CHANNEL, (weight, scale, 0, -top, top)))
        ...  for top in (127, 7)]
        [8, 4]
        >>> stored_bits(graph.call_function(BINARY, (weight, 0)))
        1
    """
    if quantizer.target in LOW_BITS:
        return LOW_BITS[quantizer.target].bits
    low, high = quantizer.args[-2:]
    assert isinstance(low, int) and isinstance(high, int)
    return (high - low).bit_length()


def rounded(graph: fx.GraphModule, quantizer: fx.Node) -> Tensor:
    """A weight as its fake quantizer gives it."""
    values = [
        tensor_of(graph, str(arg.target)).detach() if isinstance(arg, fx.Node) else arg
        for arg in quantizer.args
    ]
    return quantizer.target(*values)  # type: ignore[operator, no-any-return]


def hold_biases(graph: fx.GraphModule) -> None:
    """Raise weight scales, in place, to where every bias fits 32 bits at the product of scales."""
    least = least_weight_scales(
        graph, lambda node: node.args[1] if node.target is PER_TENSOR else None
    )
    for weight, scales in least.items():
        if weight.target is PER_CHANNEL:
            held = str(weight.args[1].target)  # type: ignore[union-attr]
            set_buffer(graph, held, torch.maximum(tensor_of(graph, held), scales))
        elif weight.target in LOW_BITS:
            raise_low_bits(graph, weight, scales)


def raise_low_bits(graph: fx.GraphModule, quantizer: fx.Node, least: Tensor) -> None:
    """The float weight's channels, of which scales are a function, grow to where these are."""
    source, axis = quantizer.args
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    weight = tensor_of(graph, str(source.target))
    with torch.no_grad():
        scales = LOW_BITS[quantizer.target].scales(weight, axis)
        if quantizer.target is not BINARY:  # a channel of zeros needs no scale
            least = least.where(scales > 0, 0.0)
        weight.copy_(raised(weight, axis, scales, least))


def least_weight_scales(
    graph: fx.GraphModule, scale_of: Callable[[fx.Node], Any]
) -> dict[fx.Node, Tensor]:
    """Weight quantizer -> the scales (C,) from which on each bias behind it fits 32 bits.

    Args:
        scale_of: the scale of a value, or None where it is in float. Of a weight with several
            inputs, the least of their scales counts.
    """
    uses: dict[fx.Node, list[Site]] = {}
    for site in sites(graph):
        for node in site.node.all_input_nodes:
            if [str(source.target) for source in node.all_input_nodes[:1]] == [site.weight]:
                uses.setdefault(node, []).append(site)
    least = {}
    for node, found in uses.items():
        scales = [scale for scale in (scale_of(site.input) for site in found) if scale is not None]
        biases = [tensor_of(graph, site.bias) for site in found if site.bias]
        if scales and biases:
            each = [least_scales(bias, min(scales)) for bias in biases]
            least[node] = torch.stack(each).amax(0)
    return least
