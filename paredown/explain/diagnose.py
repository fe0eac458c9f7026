"""Which causes there are in a graph that was watched, and what the tool has against each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core.task import Task
from paredown.explain import decibels
from paredown.explain.cause import Cause, Remedy
from paredown.explain.layers import Layer
from paredown.explain.noise import Noise
from paredown.explain.watch import Rounded, Spread, Watch, made_by, read_from
from paredown.graph.quantized.per_channel import PER_CHANNEL
from paredown.graph.quantized.quantizers import quantized_weights
from paredown.graph.state import tensor_of
from paredown.steps.pruning.prune_channels import PruneChannels
from paredown.steps.quantization.quantize import Quantize
from paredown.steps.quantization.ranges import range_method
from paredown.steps.step import Step
from paredown.steps.training.fine_tune import FineTune

# What is named. In 32 architectures without a planted fault no value lost more than 16 dB to the
# common scale of its channels, no layer's largest weights were more than 13 dB above the median
# ones, and none lost anything to a bias; 5 % of the ranges lost 6 dB, with 16 calibration examples.
RANGE_DB = 6.0  # one bit
SHARED_DB = 20.0  # more than three bits of the usual channel
OUTLYING_DB = 24.0  # the usual weight has 8 of 127 levels
HELD_DB = 3.0
SHARE = 0.25  # of a layer's own noise that must come from where the cause is,
FELT = 0.05  # and of all the noise that has reached its result
COARSE_DB = 26.0  # a layer's own noise is 5 % of its result; at 8 bits it is about 1 %
PLACES = 256  # values of a channel that must have been seen before it is called constant

Reach = Callable[[Sequence[str]], Mapping[str, tuple[float, float]]]  # node -> range in calibration


@dataclass(frozen=True)
class Context:
    """What was measured of a graph, and the recipe that made it."""

    graph: fx.GraphModule
    layers: Sequence[Layer]
    noise: Mapping[str, Noise]
    watch: Watch
    steps: Sequence[Step]
    reach: Reach
    task: Task

    @property
    def used(self) -> Quantize:
        """The recipe's last `Quantize`."""
        return next((s for s in reversed(self.steps) if isinstance(s, Quantize)), Quantize())

    def ranges(self, wider: bool) -> Remedy:
        """The ranges to try after those used."""
        method = range_method(self.used.ranges)
        name = method.wider if wider else method.narrower
        step = dataclasses.replace(self.used, ranges=name, percentile=Quantize.percentile)
        return Remedy(step, ("ranges",))

    def smooth(self, layers: Sequence[str]) -> Remedy:
        """Smoothing where it was off; where it did not help, these layers in float."""
        if self.used.smooth:
            return self.exclude(layers)
        return Remedy(dataclasses.replace(self.used, smooth=Quantize.smooth), ("smooth",))

    def exclude(self, layers: Sequence[str]) -> Remedy:
        names = tuple(dict.fromkeys((*self.used.exclude, *layers)))
        return Remedy(dataclasses.replace(self.used, exclude=names), ("exclude",))

    @property
    def trains(self) -> bool:
        """Whether the quantized model could still be trained."""
        last = self.steps[-1] if self.steps else None
        return isinstance(last, Quantize) and not self.task.missing(FineTune.needs)

    def matters(self, layers: Sequence[Layer], part: str) -> bool:
        """Whether this part of one of the layers' rounding is worth a word."""
        return any(_matters(self.noise[layer.name], part) for layer in layers)


def _matters(noise: Noise, part: str) -> bool:
    felt = noise.parts[part].error >= FELT * noise.exact.error
    return felt and noise.shares()[part] >= SHARE


def find_causes(context: Context) -> list[Cause]:
    """Every cause that its figures name, those of the noisiest layers first."""
    found: list[Cause] = []
    for rounded in context.watch.rounded.values():
        found += _of_value(context, rounded)
    for layer in context.layers:
        found += _of_weights(context, layer)
    found += _dead(context)
    return _grouped(sorted(found, key=lambda cause: _quality(context, cause)))


def _grouped(found: Sequence[Cause]) -> list[Cause]:
    """Causes of a kind that one setting mends are one, told of the layer that suffers most."""
    groups: dict[tuple[str, str], list[Cause]] = {}
    for cause in found:
        groups.setdefault((cause.kind, str(cause.remedy)), []).append(cause)
    return [
        dataclasses.replace(
            group[0], layers=tuple(dict.fromkeys(name for each in group for name in each.layers))
        )
        for group in groups.values()
    ]


def _quality(context: Context, cause: Cause) -> tuple[bool, float]:
    own = [context.noise[name].own.db for name in cause.layers]
    return cause.kind == "dead_channels", min((db for db in own if db is not None), default=0.0)


# --- of values -------------------------------------------------------------------------------


def _of_value(context: Context, rounded: Rounded) -> Iterator[Cause]:
    makers, readers = made_by(rounded, context.layers), read_from(rounded, context.layers)
    matters = context.matters(makers, "output") or context.matters(readers, "input")
    if rounded.values < PLACES or not matters or rounded.statistics.counts is None:
        return
    names = tuple(layer.name for layer in makers or readers)
    fault = _range_fault(context, rounded, names)
    if fault is not None:
        yield fault
    joined = _joined(rounded)
    spans = _spans(rounded)
    if joined is not None and joined >= SHARED_DB:
        where = tuple(layer.name for layer in readers) or names
        yield Cause(
            "shared_scale",
            where,
            f"values that span {_list(_part_spans(rounded))} are joined under one scale",
            context.exclude(where),
            joined,
        )
    elif spans is not None and len(spans) > 1:
        gain = decibels.shared_scale(spans)
        if gain >= SHARED_DB:
            yield _outlier(context, rounded, spans, gain, makers, readers)


def _range_fault(context: Context, rounded: Rounded, names: tuple[str, ...]) -> Cause | None:
    statistics = rounded.statistics
    assert statistics.counts is not None
    bins = len(statistics.counts)
    edges = torch.linspace(statistics.histogram_low, statistics.histogram_high, bins + 1)
    inside = rounded.values - rounded.beyond
    error, low, high = decibels.closest_range(
        statistics.counts, edges, rounded.inside / max(1, inside), rounded.span
    )
    total = rounded.inside + rounded.outside
    gain = decibels.falls_by(total / rounded.values, error)
    if gain < RANGE_DB:
        return None
    ranges = f"[{rounded.low:.3g}, {rounded.high:.3g}]"
    if rounded.outside < 0.5 * total:
        levels = max(1, round(255 * (high - low) / rounded.span))
        words = f"of 255 levels between {rounded.low:.3g} and {rounded.high:.3g} only {levels} pay"
        return Cause("wide_range", names, words, context.ranges(wider=False), gain)
    beyond = f"{rounded.beyond / rounded.values:.2%} of the values lie beyond {ranges}"
    reached = context.reach([rounded.source.name]).get(rounded.source.name)
    least, most = statistics.low, statistics.high
    if reached is not None and (
        least < 1.25 * min(0, reached[0]) or most > 1.25 * max(0, reached[1])
    ):
        words = (
            f"{beyond}, up to {most:.3g}, down to {least:.3g}; in the calibration data they "
            f"lie between {reached[0]:.3g} and {reached[1]:.3g}"
        )
        advice = "Task(calibration=...): more examples, and such as these"
        return Cause("saturation", names, words, advice, gain)
    words = f"{beyond} and make {rounded.outside / total:.0%} of its error"
    return Cause("clipped_range", names, words, context.ranges(wider=True), gain)


def _spans(rounded: Rounded) -> Tensor | None:
    """Widths of the channels' ranges (C,) as far as the quantizer's reaches, 0 for a constant."""
    low, high = rounded.spread.low, rounded.spread.high
    if low is None or high is None:
        return None
    spans = decibels.channel_spans(low, high).clamp(max=rounded.span)
    return spans.where(~decibels.constant_channels(low, high), 0.0)


def _part_spans(rounded: Rounded) -> list[float]:
    spans = _spans(rounded)
    assert spans is not None
    return [float(part.max()) for part in spans.split(list(rounded.parts))]


def _joined(rounded: Rounded) -> float | None:
    """What values that are joined pay for their common scale, each channel of them alike.

    None where no values are joined, or the channels of one of them differ as much.
    """
    spans = _spans(rounded)
    if not rounded.parts or spans is None or sum(rounded.parts) != len(spans):
        return None
    parts = spans.split(list(rounded.parts))
    if any(decibels.shared_scale(part) >= SHARED_DB for part in parts):
        return None
    whole = torch.cat([part.max().expand(len(part)) for part in parts])
    return decibels.shared_scale(whole)


def _outlier(
    context: Context,
    rounded: Rounded,
    spans: Tensor,
    gain: float,
    makers: Sequence[Layer],
    readers: Sequence[Layer],
) -> Cause:
    widest = int(spans.argmax())
    figures = f"channel {widest} spans {float(spans[widest]):.3g}, the median {_median(spans):.3g}"
    names, others = (tuple(layer.name for layer in each) for each in (makers, readers))
    remedy = context.smooth(names + others)
    if makers:
        return Cause("outlier_channel", names, f"in its result {figures}", remedy, gain)
    return Cause("outlier_input", others, f"in its input {figures}", remedy, gain)


def _median(spans: Tensor) -> float:
    return float(spans.median())


def _list(numbers: Sequence[float]) -> str:
    texts = [f"{number:.3g}" for number in numbers]
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


# --- of weights and results ------------------------------------------------------------------


def _of_weights(context: Context, layer: Layer) -> Iterator[Cause]:
    quantizer = quantized_weights(context.graph).get(layer.name)
    noise = context.noise[layer.name]
    if quantizer is None or quantizer.target is not PER_CHANNEL:
        return
    if not _matters(noise, "weights"):
        return
    weight, top = tensor_of(context.graph, layer.name).detach(), quantizer.args[-1]
    scale = tensor_of(context.graph, str(quantizer.all_input_nodes[1].target))
    axis: Any = quantizer.args[2]
    assert isinstance(top, int)
    away = context.exclude([layer.name])
    held, outlying = (
        decibels.held_scale(weight, scale, axis, top),
        decibels.outlying_weights(weight, axis),
    )
    if held >= HELD_DB:
        used = max(1, round(top * 10 ** (-held / 20)))
        words = f"its bias holds the weights' scale up: they use {used} of {top} levels"
        yield Cause("held_scale", (layer.name,), words, away, held)
    elif outlying >= OUTLYING_DB:
        times = 10 ** (outlying / 20)
        words = f"the largest weight of a channel is {times:.0f} times the median one"
        yield Cause("outlying_weights", (layer.name,), words, away, outlying)
    elif (layer.bits or 8) < 8 and (noise.own.db or 0.0) < COARSE_DB:
        words = f"{layer.bits} bits make {noise.shares()['weights']:.0%} of its noise"
        remedy = Remedy(FineTune()) if context.trains else away
        yield Cause("few_levels", (layer.name,), words, remedy, COARSE_DB - (noise.own.db or 0.0))


def _dead(context: Context) -> Iterator[Cause]:
    """Channels that say nothing: told of all layers at once, since one step cuts them all."""
    found: dict[str, int] = {}
    channels = 0
    for layer in context.layers:
        dead = _constant(context.watch.results[layer.exact])
        channels += 0 if dead is None else len(dead)
        if dead is not None and 0 < int(dead.sum()) < len(dead):
            found[layer.name] = int(dead.sum())
    if found:
        count = sum(found.values())
        words = (
            f"{count} of {channels:,} channels give the same value at every place of every example"
        )
        share = max(0.01, round(count / channels, 2))
        remedy = PruneChannels(share, criterion="weight_activation")
        yield Cause("dead_channels", tuple(found), words, Remedy(remedy), 0.0)


def _constant(spread: Spread) -> Tensor | None:
    """Which channels (C,) were constant; None where too little was seen of them."""
    if spread.low is None or spread.high is None or spread.values < PLACES:
        return None
    return decibels.constant_channels(spread.low, spread.high)
