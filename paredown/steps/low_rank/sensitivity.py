"""How much a model's outputs mind what one of its layers loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.interpret import Pass, Rule
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
    names = [{node.name for node in group} for group in groups]
    after: dict[int, list[Tensor]] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        lane = Pass(model.eval().graph).start(batch.inputs)
        nodes = list(model.graph.graph.nodes)
        for node in progress.track(nodes, "disturb", len(nodes)):
            for place, own in enumerate(names):
                if node.name in own and place not in after:  # what is before it is run once for all
                    after[place] = lane.fork(_disturbing(groups[place])).finish(node)
            if node.op == "output":
                before = lane.finish(node)
                return [_change(before, after[place]) for place in range(len(groups))]
            lane.step(node)
            lane.forget(node)
    raise AssertionError("a graph ends with its outputs")


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


def _disturbing(nodes: Sequence[fx.Node]) -> Rule:
    """Noise on the values of some nodes."""
    places = {node.name: place for place, node in enumerate(nodes)}

    def rule(run: Pass, node: fx.Node) -> Any:
        result = run.compute(node)
        if node.name in places and isinstance(result, Tensor):
            axis = 1 if "conv" in str(node.target) else -1
            return result + noise_like(result, SHARE, axis, places[node.name])
        return result

    return rule
