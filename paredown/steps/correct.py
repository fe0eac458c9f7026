"""Take back the shift that rounding gives a layer's output, by its bias."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from paredown import lockstep
from paredown.graph.model import Model
from paredown.graph.quantized import hold_biases, quantized_weights
from paredown.graph.sites import Site, sites, tensor_of
from paredown.progress import track
from paredown.types import Task

EXAMPLES = 256  # of the calibration split, as far as they fit into
MEMORY = 1 << 28  # bytes of values; a mean over places needs few examples


def sure_shift(shifts: Tensor) -> Tensor:
    """The mean (C,) of shifts (N, C) seen in N batches, less what chance alone would make of it:
    ``mean * max(0, 1 - (deviation of the mean / mean) ** 2)``.

    Example:
        >>> sure_shift(torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.5]]))
        tensor([1., 0.])
    """
    mean = shifts.mean(0)
    if len(shifts) < 2:
        return torch.zeros_like(mean)
    chance = shifts.var(0) / len(shifts)
    return mean * (1 - chance / mean.square().clamp(min=1e-30)).clamp(min=0)


def correct_biases(before: Model, after: Model, task: Task) -> None:
    """Move each bias of a quantized layer by the mean shift of its output, in place.

    The shift is that between ``before``, in float, and ``after``, its quantized copy, per channel
    over calibration data; layers follow one another, so that each also takes back what those
    before it shift (Nagel 1906.04721, section 4.2). A layer without a bias stays as it is.
    """
    held = quantized_weights(after.graph)
    layers = {s.node: s for s in sites(after.graph) if s.bias is not None and s.weight in held}
    uses = Counter(site.bias for site in layers.values())
    with torch.no_grad():
        given = lockstep.batches([before, after], task, EXAMPLES, MEMORY)
        exact, lanes = ([lockstep.Lane(m.graph, each) for each in given] for m in (before, after))
        ahead = iter(before.graph.graph.nodes)
        for node in track(list(after.graph.graph.nodes), "correct biases"):
            values = lockstep.run(lanes, node)
            site = layers.get(node)
            if site is not None and uses[site.bias] == 1:
                wanted = lockstep.advance(exact, ahead, node.name)
                _shift(after, site, lanes, wanted, values)
            for lane in lanes:
                lane.forget(node)
    hold_biases(after.graph)


def _shift(
    after: Model, site: Site, lanes: list[lockstep.Lane], wanted: list[Tensor], got: list[Tensor]
) -> None:
    """Correct one bias, and the values that it has made already."""
    weight = tensor_of(after.graph, site.weight)
    axis = got[0].dim() - weight.dim() + 1 if site.kind == "conv" else got[0].dim() - 1
    shifts = [
        (a - b).double().movedim(axis, 0).flatten(1).mean(1)
        for a, b in zip(wanted, got, strict=True)
    ]
    shift = sure_shift(torch.stack(shifts)).float()
    bias = tensor_of(after.graph, str(site.bias))
    if bias.shape != shift.shape or not bool(torch.isfinite(shift).all()):
        return
    bias.add_(shift)
    shape = [-1 if dim == axis else 1 for dim in range(got[0].dim())]
    for lane, value in zip(lanes, got, strict=True):
        lane.env[site.node] = value + shift.reshape(shape)
