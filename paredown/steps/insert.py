"""Put fake quantizers into a graph, and the scales of its weights and biases."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from paredown.graph.edit import insert_after, keep_meta, set_buffer
from paredown.graph.model import Model
from paredown.graph.quantized import PER_CHANNEL, PER_TENSOR
from paredown.graph.regions import Regions
from paredown.graph.sites import tensor_of
from paredown.steps.ranges import LEVELS, SMALLEST_SCALE, Range, affine

WEIGHT_MAX = 127


def channel_scales(weight: Tensor, axis: int) -> Tensor:
    """Symmetric scales (C,) that map each output channel's largest weight to 127.

    Example:
        >>> channel_scales(torch.tensor([[1.27, -0.5], [0.0, -2.54]]), 0)
        tensor([0.0100, 0.0200])
    """
    others = [dim for dim in range(weight.dim()) if dim != axis]
    return (weight.abs().amax(others) / WEIGHT_MAX).clamp(min=SMALLEST_SCALE)


def insert_quantizers(model: Model, regions: Regions, ranges: dict[str, Range]) -> None:
    """Put the fake quantizers of ``regions`` into the graph, in place."""
    scales = {node: affine(*ranges[node.name]) for node in regions.own}
    scales |= {node: scales[source] for node, source in regions.shared.items() if source in scales}
    inputs: dict[str, list[float]] = {site.weight: [] for site in regions.sites}
    for site in regions.sites:
        inputs[site.weight].append(scales[site.input][0])
    _quantize_weights(model, regions, inputs)
    for node, (scale, zero) in scales.items():
        insert_after(node, PER_TENSOR, (scale, zero, 0, LEVELS))
    model.graph.graph.lint()
    model.graph.recompile()


def _quantize_weights(model: Model, regions: Regions, inputs: dict[str, list[float]]) -> None:
    graph, made = model.graph.graph, {}
    for site in regions.sites:
        source = _weight_node(site.node, site.weight)
        if site.weight not in made:
            biases = {s.bias for s in regions.sites if s.weight == site.weight and s.bias}
            scales = channel_scales(tensor_of(model.graph, site.weight).detach().float(), site.axis)
            for bias in sorted(biases):
                scales = _hold_bias(scales, tensor_of(model.graph, bias), inputs[site.weight])
            set_buffer(model.graph, f"{site.weight}_scale", scales)
            with graph.inserting_after(source):
                held = graph.get_attr(f"{site.weight}_scale")
            with graph.inserting_after(held):
                made[site.weight] = graph.call_function(
                    PER_CHANNEL, (source, held, site.axis, -WEIGHT_MAX, WEIGHT_MAX)
                )
            keep_meta(made[site.weight], source)
        site.node.update_arg(list(site.node.args).index(source), made[site.weight])


def _weight_node(node: fx.Node, name: str) -> fx.Node:
    return next(a for a in node.args if isinstance(a, fx.Node) and a.target == name)


def _hold_bias(scales: Tensor, bias: Tensor, input_scales: list[float]) -> Tensor:
    """Scales large enough that each bias fits 32 bits at input scale times weight scale."""
    smallest = bias.detach().abs().float() / (min(input_scales) * 2**30)  # (C,)
    return torch.maximum(scales, smallest)
