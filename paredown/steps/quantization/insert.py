"""Put fake quantizers into a graph, and the scales of its weights and biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, fx

from paredown.graph.edit import insert_after, keep_meta
from paredown.graph.model import Model
from paredown.graph.quantized.forms import Form, of_op
from paredown.graph.quantized.group_scales import Grid
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import (
    DYNAMIC,
    PER_TENSOR,
    hold_biases,
    quantized_weights,
)
from paredown.graph.quantized.regions import Regions
from paredown.graph.quantized.scales import (
    LEVELS,
    affine,
    channel_scales,
    closest_scales,
)
from paredown.graph.sites import Site
from paredown.graph.state import set_buffer, tensor_of
from paredown.steps.quantization import weight_layers
from paredown.steps.quantization.range_methods import Range
from paredown.steps.quantization.weight_layers import Rounding


def insert_quantizers(
    model: Model, regions: Regions, ranges: dict[str, Range], bits: Mapping[str, int]
) -> None:
    """Put the fake quantizers of ``regions`` into the graph, in place; ``bits`` of each weight."""
    scales = {node: affine(*ranges[node.name]) for node in regions.own}
    scales |= {node: scales[source] for node, source in regions.shared.items() if source in scales}
    _insert_weights(model, regions.sites, bits)
    for node, (scale, zero) in scales.items():
        insert_after(node, PER_TENSOR, (scale, zero, 0, LEVELS), regions.takers.get(node))
    hold_biases(model.graph)
    model.graph.graph.lint()
    model.graph.recompile()


def insert_dynamic(model: Model, layers: Sequence[Site]) -> None:
    """Put 8-bit quantizers before these layers, in place, whose range is that of what comes."""
    _insert_weights(model, layers, {site.weight: 8 for site in layers})
    inputs: dict[fx.Node, set[fx.Node]] = {}
    for site in layers:
        inputs.setdefault(site.input, set()).add(site.node)
    for node, readers in inputs.items():
        insert_after(node, DYNAMIC, (0, LEVELS), readers)
    model.graph.graph.lint()
    model.graph.recompile()


def insert_tables(model: Model, bits: int, skip: Collection[str]) -> None:
    """Let lookups read tables of 8 or 4 bits, in place; ``skip`` names tables that stay in float.

    At 8 bits each row has a scale, by which its largest value is the largest integer: that of the
    row of a linear layer which reads the same table. At 4 bits groups of 32 have one.
    """
    for layer in weight_layers.tables(model, Rounding(bits, 0 if bits == 8 else 32), skip):
        if bits == 8:
            grid: Grid = (channel_scales(layer.weight.detach(), layer.axis)[:, None], None)
        else:
            grid = weight_layers.nearest(layer)
        weight_layers.insert(model, layer, grid, [site.node for site in layer.uses])
    model.graph.graph.lint()
    model.graph.recompile()


def _insert_weights(model: Model, layers: Sequence[Site], bits: Mapping[str, int]) -> None:
    made: dict[str, fx.Node] = {}
    low = quantized_weights(model.graph)  # of fewer bits already
    place = {node: number for number, node in enumerate(model.graph.graph.nodes)}
    for site in sorted(layers, key=lambda site: place[site.node]):
        if site.weight in low:
            continue
        source = next(a for a in site.node.all_input_nodes if a.target == site.weight)
        if site.weight not in made:
            made[site.weight] = _quantize_weight(
                model.graph, site, source, of_op(PER_CHANNEL, bits[site.weight])
            )
        site.node.replace_input_with(source, made[site.weight])


def _quantize_weight(graph: fx.GraphModule, site: Site, source: fx.Node, form: Form) -> fx.Node:
    """The quantizer stands right before what reads it, so that one rounded weight is in memory at a
    time."""
    weight = tensor_of(graph, site.weight).detach().float()
    name = f"{site.weight}_scale"
    set_buffer(graph, name, _weight_scales(weight, site.axis, form))
    with graph.graph.inserting_before(site.node):
        held = graph.graph.get_attr(name)
        made = graph.graph.call_function(form.op, (source, held, site.axis, form.low, form.high))
    keep_meta(made, source)
    return made


def _weight_scales(weight: Tensor, axis: int, form: Form) -> Tensor:
    """At 8 bits the largest weight is not worth clipping; at 4 it would cost the others levels."""
    if form.bits == 8:
        return channel_scales(weight, axis, form.high)
    return closest_scales(weight, axis, form.low, form.high)
