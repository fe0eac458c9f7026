"""How much a model's outputs mind what one of its layers loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.interpret import Pass
from paredown.graph.model import Model

SHARE = 0.1  # of what the layer's outputs vary, as noise
EXAMPLES = 8


def noise_like(y: Tensor, share: float, axis: int, seed: int) -> Tensor:
    """White noise with that share of the energy of the values about their channels' means.

    Example:
        >>> y = torch.randn(2000, 4) + 5
        >>> round(float(noise_like(y, 0.5, 1, 0).square().mean()), 1)
        0.5
    """
    others = [dim for dim in range(y.dim()) if dim != axis % y.dim()]
    energy = (y - y.mean(others, keepdim=True)).square().mean()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(y.shape, generator=generator).to(y) * (share * energy).sqrt()


def sensitivities(model: Model, task: Task, groups: Sequence[Sequence[fx.Node]]) -> list[float]:
    """For each group of nodes, how much the model's outputs change where a tenth of the energy of
    theirs is noise, as a share of the outputs' energy, on a few calibration examples.

    Raises:
        UserError: no calibration data, or too little for the model's batch.
    """
    split = splits.split(task, "calibration")
    size = feed.size(model, task.batch_size, EXAMPLES)
    [batch] = feed.whole(model, split, "calibration", size, 1, shuffle=True).bound()
    with torch.random.fork_rng(devices=[]):
        before = _outputs(model.eval().graph, batch.inputs, [])
        return [
            _change(before, _outputs(model.graph, batch.inputs, nodes))
            for nodes in progress.track(groups, "disturb", len(groups))
        ]


def _change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The share of the energy about their means; what is NaN or infinite counts for nothing."""
    changed = energy = 0.0
    for old, new in zip(before, after, strict=True):
        if old.is_floating_point():
            known = old.isfinite() & new.isfinite()
            rows = old[known].double()
            changed += float((new[known].double() - rows).square().sum())
            energy += float((rows - rows.mean()).square().sum())
    return changed / max(energy, 1e-300)


def _outputs(
    graph: fx.GraphModule, leaves: list[Tensor], disturbed: Sequence[fx.Node]
) -> list[Tensor]:
    """The outputs with noise on the values of some nodes."""
    places = {node.name: place for place, node in enumerate(disturbed)}

    def rule(run: Pass, node: fx.Node) -> Any:
        result = run.compute(node)
        if node.name in places and isinstance(result, Tensor):
            axis = 1 if "conv" in str(node.target) else -1
            return result + noise_like(result, SHARE, axis, places[node.name])
        return result

    return Pass(graph, rule).outputs(leaves)
