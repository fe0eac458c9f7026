"""Post-training static quantization to 8-bit integers."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from paredown.calibrate import BINS, Statistics, observe
from paredown.graph.edit import fold_batch_norm, insert_after, keep_meta, set_buffer
from paredown.graph.model import Model
from paredown.graph.quantized import PER_CHANNEL, PER_TENSOR, quantizers
from paredown.graph.regions import Regions, find_regions, prepare
from paredown.graph.sites import sites, tensor_of
from paredown.types import Task, UserError

Range = tuple[float, float]
LEVELS = 255  # the largest activation, as an unsigned byte
WEIGHT_MAX = 127
SMALLEST_SCALE = 1e-12


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that map [low, high], widened to hold 0, onto 0..255.

    Zero is exact, so that padding and ReLU add no error (Jacob et al. 1712.05877).

    Example:
        >>> scale, zero_point = affine(-0.5, 0.75)
        >>> round(scale, 5), zero_point
        (0.0049, 102)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / LEVELS, SMALLEST_SCALE)
    return scale, min(LEVELS, max(0, round(-low / scale)))


def channel_scales(weight: Tensor, axis: int) -> Tensor:
    """Symmetric scales (C,) that map each output channel's largest weight to 127.

    Example:
        >>> channel_scales(torch.tensor([[1.27, -0.5], [0.0, -2.54]]), 0)
        tensor([0.0100, 0.0200])
    """
    others = [dim for dim in range(weight.dim()) if dim != axis]
    return (weight.abs().amax(others) / WEIGHT_MAX).clamp(min=SMALLEST_SCALE)


def minmax_range(statistics: Statistics) -> Range:
    """Everything that was seen."""
    return statistics.low, statistics.high


def percentile_range(statistics: Statistics, percentile: float = 99.99) -> Range:
    """The central ``percentile`` of the values, the rest clipped evenly at both ends."""
    counts, edges = _histogram(statistics)
    cumulative = counts.cumsum(0) / counts.sum()
    tail = (1 - percentile / 100) / 2
    first = int(torch.searchsorted(cumulative, torch.tensor(tail), right=True))
    last = int(torch.searchsorted(cumulative, torch.tensor(1 - tail)))
    return float(edges[min(first, BINS - 1)]), float(edges[min(last, BINS - 1) + 1])


def mse_range(statistics: Statistics) -> Range:
    """The clipping with the least squared error of rounding plus clipping (Sung 1511.06488)."""
    counts, edges = _histogram(statistics)
    centres = (edges[:-1] + edges[1:]) / 2  # (BINS,)
    return min(_clippings(statistics), key=lambda r: _squared_error(counts, centres, r))


def entropy_range(statistics: Statistics) -> Range:
    """The clipping whose rounded distribution has the least Kullback-Leibler divergence.

    As TensorRT's calibrator (Migacz, GTC 2017), for ranges with and without a negative side.
    """
    counts, edges = _histogram(statistics)
    counts = _without_zeros(counts, edges)
    return min(_clippings(statistics), key=lambda r: _divergence(counts, edges, r))


def _histogram(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Counts (BINS,) and bin edges (BINS + 1,)."""
    assert statistics.counts is not None
    edges = torch.linspace(statistics.histogram_low, statistics.histogram_high, BINS + 1)
    return statistics.counts, edges


def _clippings(statistics: Statistics) -> list[Range]:
    """Candidate ranges: each end shrunk on its own, 100 % first so that it wins ties."""
    shrink = [1.0 - 0.02 * k for k in range(40)]
    low, high = min(statistics.low, 0.0), max(statistics.high, 0.0)
    both = [(low * f, high * f) for f in shrink]
    if low == 0.0 or high == 0.0 or abs(low) > abs(high) / 4:
        return both
    return both + [(low, high * f) for f in shrink]  # a short negative side, as of SiLU and GELU


def _squared_error(counts: Tensor, centres: Tensor, clip: Range) -> float:
    scale, zero = affine(*clip)
    levels = (torch.round(centres / scale) + zero).clamp(0, LEVELS)
    inside = (levels > 0) & (levels < LEVELS)
    error = torch.where(
        inside, torch.tensor(scale**2 / 12), ((levels - zero) * scale - centres) ** 2
    )
    return float((counts * error).sum())


def _without_zeros(counts: Tensor, edges: Tensor) -> Tensor:
    """Counts (BINS,) with no more in the bins that hold 0 than beside them.

    Zero is exact at any scale. Half of what leaves a ReLU is zero; taken for values that rounding
    spreads over their level, it would ask for the finest level, and so for clipping all else.

    Example:
        >>> _without_zeros(torch.tensor([90.0, 6.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
        tensor([6., 6., 5.])
    """
    here = ((edges[:-1] <= 0) & (edges[1:] >= 0)).nonzero().flatten().tolist()
    if not here:
        return counts
    beside = [float(counts[n]) for n in (here[0] - 1, here[-1] + 1) if 0 <= n < len(counts)]
    made = counts.clone()
    made[here] = made[here].clamp(max=sum(beside) / len(beside))
    return made


def _divergence(counts: Tensor, edges: Tensor, clip: Range) -> float:
    """Divergence of p from q: p is what clipping leaves, the clipped counts in its end bins; q is
    what lay inside the range, the counts of each level spread over the bins of p that it holds.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    inside = ((centres >= clip[0]) & (centres <= clip[1])).nonzero().flatten()
    if not len(inside) or not bool(counts[inside].any()):
        return float("inf")
    first, last = int(inside[0]), int(inside[-1])
    kept = counts[first : last + 1]  # (K,)
    p = kept.clone()
    p[0] += counts[:first].sum()
    p[-1] += counts[last + 1 :].sum()
    scale, zero = affine(*clip)
    levels = (torch.round(centres[first : last + 1] / scale) + zero).clamp(0, LEVELS).long()
    total = torch.zeros(LEVELS + 1).index_add_(0, levels, kept)
    filled = torch.zeros(LEVELS + 1).index_add_(0, levels, (p > 0).float()).clamp(min=1)
    q = (total / filled)[levels] / kept.sum()
    p, seen = p / p.sum(), p > 0
    return float((p[seen] * torch.log(p[seen] / q[seen].clamp(min=1e-9))).sum())


RANGES: dict[str, Callable[..., Range]] = {
    "mse": mse_range,
    "minmax": minmax_range,
    "percentile": percentile_range,
    "entropy": entropy_range,
}


@dataclass(frozen=True)
class Quantize:
    """Weights to int8 per channel and activations to uint8 per tensor, after training.

    Good for convolutional networks and the linear layers of transformers: the file shrinks to
    about a quarter, and kernels with int8 dot products run about twice as fast. It does not pay
    in latency on tiny layers, where moving bytes costs as much as computing on them, nor on CPUs
    without int8 dot products; models of mostly embeddings or recurrent layers shrink little,
    since those stay in float.

    Args:
        scheme: "int8".
        ranges: how activation ranges are chosen from the calibration data: "mse", "minmax",
            "percentile" or "entropy".
        percentile: for ``ranges="percentile"``, the share of values kept, in per cent.
        first, last: whether the first and the last layer are quantized too.
        exclude: names of weights, or patterns such as ``"head.*"``, that stay in float.

    Raises:
        UserError: unknown settings; a model that is quantized already or has no layer that runs
            on integers; calibration data with NaN or infinite values.

    Example:
        >>> import torch, paredown
        >>> from torch.utils.data import TensorDataset
        >>> model = paredown.capture(torch.nn.Linear(4, 2), (torch.zeros(1, 4),))
        >>> data = TensorDataset(torch.randn(16, 4), torch.zeros(16))
        >>> task = paredown.Task(example=(torch.zeros(1, 4),), score=None, calibration=data)
        >>> quantized = Quantize("int8").apply(model, task)
        >>> sorted(quantized.state_dict())
        ['bias', 'weight', 'weight_scale']
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    scheme: str = "int8"
    ranges: str = "mse"
    percentile: float = 99.99
    first: bool = True
    last: bool = True
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme != "int8":
            raise UserError(f'quantize: scheme {self.scheme!r} is not known; it can be "int8".')
        if self.ranges not in RANGES:
            raise UserError(f"quantize: ranges {self.ranges!r} is not one of {', '.join(RANGES)}.")
        if not 50 < self.percentile <= 100:
            raise UserError(f"quantize: percentile must be in (50, 100], got {self.percentile}.")
        object.__setattr__(self, "exclude", tuple(self.exclude))

    @property
    def form(self) -> str:
        return self.scheme

    def apply(self, model: Model, task: Task) -> Model:
        if quantizers(model.graph):
            raise UserError("quantize: the model is quantized already.")
        made = model.copy().eval()
        prepare(made)
        fold_batch_norm(made.graph)
        regions = find_regions(made, self._skipped(made))
        if not regions.sites:
            raise UserError("quantize: no convolution or linear layer is left to run on integers.")
        statistics = observe(made, task, regions.own, histogram=self.ranges != "minmax")
        insert_quantizers(made, regions, {n: self._range(s) for n, s in statistics.items()})
        return made

    def _range(self, statistics: Statistics) -> Range:
        if self.ranges == "percentile":
            return percentile_range(statistics, self.percentile)
        return RANGES[self.ranges](statistics)

    def _skipped(self, model: Model) -> set[str]:
        weights = [site.weight for site in sites(model.graph)]
        skipped = set()
        for pattern in self.exclude:
            matched = {name for name in weights if fnmatch.fnmatchcase(name, pattern)}
            if not matched:
                near = difflib.get_close_matches(pattern, weights, 1, 0.0)
                raise UserError(
                    f"quantize: exclude {pattern!r} is no layer; the nearest is {near}."
                )
            skipped |= matched
        layers = [s.weight for s in sites(model.graph) if s.kind in ("conv", "linear", "matmul")]
        return (
            skipped
            | set(layers[:1] if not self.first else ())
            | set(layers[-1:] if not self.last else ())
        )


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
