"""Even out channels before they share one scale, without changing what the model computes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from paredown.core.task import Task
from paredown.data.observe import observe_channels
from paredown.graph.coupling.scale_walk import Exchange, Reader
from paredown.graph.coupling.scaling import exchange, move
from paredown.graph.model import Model
from paredown.graph.state import tensor_of
from paredown.graph.values import refresh_values

FURTHEST = 1e3  # the most that a channel is moved, so that no weight leaves the range of floats


def smoothing_factors(values: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """What each channel (C,) is multiplied by, from its largest value and the largest weight that
    reads it: ``weight ** (1 - share) / value ** share`` (SmoothQuant 2211.10438, equation 4).

    At ``share`` 1 all channels become equally large, at 0 all weights; at 0.5 the two meet half way
    (Nagel 1906.04721, equation 11). A channel of nothing stays, and the mean of logarithms is 0.

    Example:
        >>> smoothing_factors(np.array([1.0, 4.0, 0.0]), np.array([1.0, 1.0, 1.0]), 0.5).round(3)
        array([1.414, 0.707, 1.   ])
    """
    seen = (values > 0) & (weights > 0)
    logs = np.zeros(len(values))
    logs[seen] = (1 - share) * np.log(weights[seen]) - share * np.log(values[seen])
    logs[seen] -= logs[seen].mean() if seen.any() else 0.0
    furthest = np.log(FURTHEST)
    return np.exp(logs.clip(-furthest, furthest))


def equalize(model: Model, task: Task, layers: Iterable[str], share: float) -> None:
    """Move each channel's size from values to the weights that read them, in place.

    ``layers`` names the weights whose layers will run on integers. A channel that only others read
    stays as it is. The model's graph must be functional and in evaluation mode.
    """
    refresh_values(model)
    found = exchange(model.graph)
    wanted = set(layers)
    readers = [reader for reader in found.readers if reader.site.weight in wanted]
    if not readers:
        return
    axes = {reader.site.input: _channel_axis(reader) for reader in readers}
    largest = observe_channels(model, task, axes)
    values, weights = np.zeros(found.count), np.zeros(found.count)
    for reader in readers:
        seen = largest[reader.site.input.name].double().numpy()
        np.maximum.at(values, reader.channels, seen / max(float(seen.max()), 1e-30))
        np.maximum.at(weights, *_weights(model, reader))
    move(model.graph, found, _at_rest(found, readers, smoothing_factors(values, weights, share)))


def _at_rest(found: Exchange, readers: list[Reader], factors: np.ndarray) -> np.ndarray:
    """The factors of what ``readers`` read; 1 for every other channel."""
    read = np.zeros(found.count, dtype=bool)
    for reader in readers:
        read[reader.channels] = True
    return np.where(read, factors, 1.0)


def _channel_axis(reader: Reader) -> int:
    """Of the layer's input: axis 1 of (B, C, ...) images, the last of anything else."""
    value = reader.site.input.meta["val"]
    batched = reader.site.node.meta["val"].dim() == value.dim() and reader.site.kind == "conv"
    weight_rank = len(reader.part.labels.shape)
    return value.dim() - weight_rank + 1 if batched else value.dim() - 1


def _weights(model: Model, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """The labels that a weight's elements have, and the largest of each beside the layer's; both
    flat."""
    weight = tensor_of(model.graph, reader.site.weight).detach().abs()
    labels = reader.part.labels
    same = [dim for dim, size in enumerate(labels.shape) if size == 1]
    largest = (weight.amax(same, keepdim=True) if same else weight).double()
    return labels.reshape(-1), (largest / largest.max().clamp(min=1e-30)).reshape(-1).numpy()
