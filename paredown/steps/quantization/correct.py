"""Take back the shift that rounding gives a layer's output, by its bias."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from paredown.core.progress import track
from paredown.core.task import Task
from paredown.data import lockstep
from paredown.data.observe import enough
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import hold_biases, quantized_weights
from paredown.graph.sites import Site, readers, sites
from paredown.graph.state import tensor_of

BATCHES = 8  # at least, as far as there are so many examples
MEMORY = 1 << 26  # bytes of values between layers that a batch may hold, of both models


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
    over calibration data (Nagel 1906.04721, section 4.2). Layers follow one another: each batch
    takes its own shift back before the next layer, whose shift is then what that layer alone makes
    of inputs with the right means. So batches run one by one, and few values are in memory. A
    layer without a bias, or one whose bias others read, stays as it is.
    """
    held = quantized_weights(after.graph)
    layers = {s.node: s for s in sites(after.graph) if s.bias is not None and s.weight in held}
    biases = {node: tensor_of(after.graph, str(site.bias)) for node, site in layers.items()}
    read = readers(after.graph)
    corrected = {node: site for node, site in layers.items() if len(read[id(biases[node])]) == 1}
    shifts: dict[fx.Node, list[Tensor]] = {}
    with torch.no_grad():
        given = lockstep.batches([before, after], task, enough(before, after), MEMORY, BATCHES)
        for seed, inputs in enumerate(track(given, "correct biases")):
            for node, shift in _shifts(before, after, corrected, inputs, seed):
                shifts.setdefault(node, []).append(shift)
        for node, found in shifts.items():
            shift = sure_shift(torch.stack(found)).float()
            if bool(torch.isfinite(shift).all()):
                biases[node].add_(shift)
    hold_biases(after.graph)


def _shifts(
    before: Model, after: Model, layers: dict[fx.Node, Site], inputs: list[Tensor], seed: int
) -> Iterator[tuple[fx.Node, Tensor]]:
    """The mean shift (C,) of each layer's output in one batch, taken back for the layers after."""
    exact, lane = (lockstep.start(model, inputs) for model in (before, after))
    ahead = iter(before.graph.graph.nodes)
    for node in after.graph.graph.nodes:
        got, site = lockstep.step(lane, node, seed), layers.get(node)
        if site is not None:
            [wanted] = lockstep.advance([exact], ahead, node.name)
            rank = tensor_of(after.graph, site.weight).dim()
            axis = got.dim() - rank + 1 if site.kind == "conv" else got.dim() - 1
            shift = (wanted - got).movedim(axis, 0).flatten(1).double().mean(1)
            if shift.shape == tensor_of(after.graph, str(site.bias)).shape:
                shape = [-1 if dim == axis else 1 for dim in range(got.dim())]
                lane.env[node] = got + shift.float().reshape(shape)
                yield node, shift
        lane.forget(node)
