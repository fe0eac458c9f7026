"""Run batches through a graph and gather statistics of its values, one batch in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.interpret import Pass, noting
from paredown.graph.model import Model

BINS = 2048
MEMORY = 1 << 25  # bytes of values between layers that a batch may hold
FEWEST, MOST = 8, 256  # examples for what a few tell;
WORK = 1 << 27  # between the two, as many as have so many bytes of values together
SAMPLE = 1 << 16  # values of a tensor and batch that enter its histogram; the range sees them all


@dataclass
class Statistics:
    """Exact range and a histogram of everything a value took on.

    ``counts`` (BINS,) spans [histogram_low, histogram_high]; it is filled from an evenly strided
    sample of at most 65,536 values a batch.
    """

    low: float = float("inf")
    high: float = float("-inf")
    counts: Tensor | None = None
    histogram_low: float = 0.0
    histogram_high: float = 0.0
    non_finite: int = 0
    values: int = 0

    def add(self, tensor: Tensor, histogram: bool) -> None:
        flat = _flat(tensor.detach())
        if not flat.numel():
            return
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (low > float("-inf") and high < float("inf")):  # NaN compares false
            self.non_finite += int((~torch.isfinite(flat)).sum())
            return
        self.values += flat.numel()
        self.low, self.high = min(self.low, low), max(self.high, high)
        if histogram:
            self._count(flat[:: _stride(flat.numel())].float(), low, high)

    def _count(self, sample: Tensor, low: float, high: float) -> None:
        if self.counts is None:
            margin = 0.0 if high > low else max(abs(low), 1e-12) * 1e-3
            self.histogram_low, self.histogram_high = low - margin, high + margin
            self.counts = torch.zeros(BINS)
        elif low < self.histogram_low or high > self.histogram_high:
            self._widen(min(low, self.histogram_low), max(high, self.histogram_high))
        self.counts += torch.histc(sample, BINS, self.histogram_low, self.histogram_high)

    def _widen(self, low: float, high: float) -> None:
        """Move the counts to a wider span; each goes to the bin that holds its centre."""
        assert self.counts is not None
        step = (self.histogram_high - self.histogram_low) / BINS
        centres = self.histogram_low + step * (torch.arange(BINS) + 0.5)
        target = ((centres - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        self.counts = torch.zeros(BINS).index_add_(0, target, self.counts)
        self.histogram_low, self.histogram_high = low, high


def _flat(tensor: Tensor) -> Tensor:
    """All values in the order they lie in memory, so that nothing is copied."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _stride(values: int) -> int:
    """A step through the values that shares no factor with them: else it would meet the same
    columns or channels again and again.

    Example:
        >>> _stride(100), _stride(64 * 64 * 112 * 112)
        (1, 783)
    """
    stride = max(1, values // SAMPLE)
    while math.gcd(stride, values) > 1:
        stride -= 1
    return stride


def observe(
    model: Model, task: Task, values: Iterable[fx.Node], histogram: bool
) -> dict[str, Statistics]:
    """Statistics of graph values (node name -> Statistics) over the calibration split.

    Raises:
        UserError: no calibration data, or a value that becomes NaN or infinite; names it.
    """
    statistics = {node.name: Statistics() for node in values}

    def note(name: str, tensor: Tensor) -> None:
        statistics[name].add(tensor, histogram)

    run(model, task, set(statistics), note)
    for name, found in statistics.items():
        if found.non_finite:
            raise _not_finite(name, found.non_finite)
        if not found.values:
            raise UserError(f"calibration: {name!r} never ran on the calibration data.")
    return statistics


def observe_channels(model: Model, task: Task, axes: Mapping[fx.Node, int]) -> dict[str, Tensor]:
    """The largest absolute value of each channel (C,) of graph values (node name -> that), over
    `enough` of the calibration split; ``axes`` says which dimension the channels are.

    Raises:
        UserError: no calibration data, or a value that becomes NaN or infinite; names it.
    """
    dims = {node.name: axis for node, axis in axes.items()}
    largest: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        others = [dim for dim in range(tensor.dim()) if dim != dims[name]]
        seen = torch.linalg.vector_norm(tensor.float(), torch.inf, others)
        largest[name] = torch.maximum(largest.get(name, seen), seen)  # NaN stays

    run(model, task, set(dims), note, enough(model))
    for name, found in largest.items():
        if not bool(torch.isfinite(found).all()):
            raise _not_finite(name, int((~torch.isfinite(found)).sum()))
    return largest


def _not_finite(name: str, count: int) -> UserError:
    return UserError(
        f"calibration: {count} values of {name!r} are NaN or infinite; "
        "check the calibration data and the model's outputs on it."
    )


def run(
    model: Model,
    task: Task,
    names: set[str],
    note: Callable[[str, Tensor], None],
    examples: int | None = None,
) -> None:
    """Run the calibration split, or so many examples of it, calling ``note(name, tensor)`` for
    each named value.

    The model is left in evaluation mode.
    """

    def look(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            note(node.name, value)

    with torch.no_grad(), channels_last(model) as graph:
        recorder = Pass(graph, noting(look, names))
        for leaves in inputs(model, task, examples):
            recorder.run(*leaves)


def inputs(model: Model, task: Task, examples: int | None = None) -> Iterator[list[Tensor]]:
    """The calibration split, or about so many random examples of it, in small batches: the tensors
    of each, in the graph's order.

    Raises:
        UserError: no calibration data, or too little for the model's batch.
    """
    size = feed.fitting(model, task, MEMORY)
    most = None if examples is None else -(-examples // size)
    data, some = splits.split(task, "calibration"), examples is not None
    given = feed.whole(model, data, "calibration", size, most, shuffle=some)
    for batch in progress.track(given.bound(), "calibrate", len(given)):
        yield batch.inputs


def enough(*models: Model) -> int:
    """How many examples to take for what a few tell: fewer of a large network, whose values are
    many and whose runs are long."""
    return max(FEWEST, min(MOST, int(WORK / feed.example_bytes(models))))


@contextlib.contextmanager
def channels_last(model: Model) -> Iterator[fx.GraphModule]:
    """The model's graph with channels last in memory, where CPU convolutions are twice as fast.

    A graph with views of its values' memory keeps the usual layout: a view would fail.
    """
    graph, usual, last = model.eval().graph, torch.contiguous_format, torch.channels_last
    images = [p for p in graph.parameters() if p.dim() == 4]
    turned = [p for p in images if not p.is_contiguous(memory_format=last)]  # none within another
    try:
        _lay_out(turned, last)
        try:
            if turned:
                graph(*[item.example.clone() for item in model.inputs])
        except RuntimeError:
            _lay_out(turned, usual)
        yield graph
    finally:
        _lay_out(turned, usual)


def _lay_out(parameters: list[nn.Parameter], layout: torch.memory_format) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.contiguous(memory_format=layout)
