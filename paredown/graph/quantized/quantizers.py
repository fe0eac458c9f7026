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

from paredown.graph.quantized.forms import Form, Rounded, form_of
from paredown.graph.quantized.low_bits import raised
from paredown.graph.quantized.rounding import affine_of, on_grid, round_to_grid
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


def _straight_through_all(ctx, grad):  # type: ignore[no-untyped-def]
    return grad, None, None


fake_quantize_dynamic.register_autograd(_straight_through_all)
fake_quantize.register_autograd(_straight_through, setup_context=_save_inside)

PER_TENSOR = torch.ops.paredown.fake_quantize.default
DYNAMIC = torch.ops.paredown.fake_quantize_dynamic.default

ACTIVATION_QUANTIZERS = frozenset({PER_TENSOR, DYNAMIC})


def quantizers(graph: fx.GraphModule) -> list[fx.Node]:
    """The fake quantizers of a graph, in the order it runs them; none where it is in float."""
    return [
        node
        for node in graph.graph.nodes
        if node.target in ACTIVATION_QUANTIZERS or form_of(node) is not None
    ]


def quantized_weights(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Parameter name -> the fake quantizer it passes through."""
    return {
        str(node.args[0].target): node
        for node in graph.graph.nodes
        if form_of(node) is not None and isinstance(node.args[0], fx.Node)
    }


def weight_forms(graph: fx.GraphModule) -> dict[str, Form]:
    """Parameter name -> the form that its fake quantizer gives it."""
    found = {name: form_of(node) for name, node in quantized_weights(graph).items()}
    return {name: form for name, form in found.items() if form is not None}


def rounded(graph: fx.GraphModule, quantizer: fx.Node) -> Tensor:
    """A weight as its fake quantizer gives it."""
    return quantizer.target(*_values(graph, quantizer))  # type: ignore[operator, no-any-return]


def read(graph: fx.GraphModule, quantizer: fx.Node) -> Rounded:
    """The same as integers, with their scales."""
    form, source = form_of(quantizer), quantizer.args[0]
    assert form is not None and isinstance(source, fx.Node)
    return form.read(str(source.target), *_values(graph, quantizer))


def _values(graph: fx.GraphModule, quantizer: fx.Node) -> list[Any]:
    """A quantizer's arguments, each tensor that it reads in the place of the reading node."""
    return [
        tensor_of(graph, str(arg.target)).detach() if isinstance(arg, fx.Node) else arg
        for arg in quantizer.args
    ]


def hold_biases(graph: fx.GraphModule) -> None:
    """Raise weight scales, in place, to where every bias fits 32 bits at the product of scales."""
    least = least_weight_scales(
        graph, lambda node: node.args[1] if node.target is PER_TENSOR else None
    )
    for weight, scales in least.items():
        raise_scales(graph, weight, scales)


def raise_scales(graph: fx.GraphModule, quantizer: fx.Node, least: Tensor) -> None:
    """Raise the scales (C,) of a weight, in place, to ``least`` where they are smaller.

    Where they follow from the float weight, its channels grow to where their scales are these.
    """
    form = form_of(quantizer)
    if form is None or form.alone:  # its layer's bias stays in float
        return
    if form.follows:
        made = read(graph, quantizer)
        scales = made.scales[:, 0]
        if 0 in form.grid:  # a channel of zeros needs no scale
            least = least.where(scales > 0, 0.0)
        with torch.no_grad():
            tensor_of(graph, made.name).copy_(raised(made.weight, made.axis, scales, least))
    else:
        held = str(quantizer.args[1].target)  # type: ignore[union-attr]
        set_buffer(graph, held, torch.maximum(tensor_of(graph, held), least))


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
