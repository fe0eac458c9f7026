"""Mixed precision: which layers stay in float so that the score holds, and no more than needed.

Each layer alone is rounded, and what that costs is measured on the validation data: in the task's
own score and, where that does not move, in the outputs. The layers that cost most for the bytes
that they save are given back to float first; how many of them is found by halving, each candidate
being quantized anew and scored (Wang 1811.08886 and Dong 1911.03852 search the same space).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.progress import say, track
from paredown.core.task import Task
from paredown.core.units import parse_drop
from paredown.data.evaluate import scored
from paredown.data.feed import Batch, examples
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import quantized_weights, quantizers, weight_forms
from paredown.graph.quantized.runner import Runner
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.steps.step import forget

EXAMPLES = 256  # on which layers are told apart; candidates are scored on the whole split


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one layer alone costs.

    Attributes:
        drop: of the mean score.
        noise: squared error of the outputs over their squares.
        saved_bytes: by how much the file's weights shrink.
    """

    weight: str
    drop: float
    noise: float
    saved_bytes: int


@dataclass(frozen=True)
class Tried:
    """A candidate: how many layers stayed in float, the bytes of all weights, and its score."""

    floats: int
    bytes: int
    score: float


def least_floats(
    order: Sequence[str], score: Callable[[Sequence[str]], float], least: float
) -> list[str] | None:
    """The shortest start of ``order`` whose score is at least ``least``, by halving; None where not
    even all of it does, which is looked at only where nothing shorter did.

    Example:
        >>> least_floats(["a", "b", "c"], lambda kept: len(kept) / 3, 0.5)
        ['a', 'b']
    """
    if score([]) >= least:
        return []
    below, enough = 0, len(order) + 1
    while enough - below > 1:
        middle = (below + enough) // 2
        if score(order[:middle]) >= least:
            enough = middle
        else:
            below = middle
    return list(order[:enough]) if enough <= len(order) else None


def choose(
    model: Model,
    task: Task,
    max_drop: float | str,
    quantize: Callable[[Sequence[str]], Model],
    note: Callable[[dict[str, Any]], None] = forget,
) -> list[str]:
    """The weights that stay in float so that the score falls by at most ``max_drop``.

    Args:
        quantize: the quantized model, with these weights in float.
        note: takes what was tried, for the report.

    Raises:
        UserError: the score falls by more even with all but the last layer in float.
    """
    original = mean_score(model, task)
    in_points = 0 <= original <= 1
    allowed = parse_drop(max_drop) * (1.0 if in_points else abs(original))
    whole = quantize([])
    ranked = sorted(sensitivities(whole, task), key=_cost_per_byte, reverse=True)
    order = [each.weight for each in ranked]
    saved = {each.weight: each.saved_bytes for each in ranked}
    full = sum(p.numel() * 4 for p in model.parameters())
    tried: list[Tried] = []

    def score(floats: Sequence[str]) -> float:
        made = quantize(floats) if floats else whole
        held = full - sum(size for name, size in saved.items() if name not in floats)
        tried.append(Tried(len(floats), held, mean_score(made, task)))
        say(f"    {len(floats)} of {len(order)} layers in float: score {tried[-1].score:.4g}")
        return tried[-1].score

    chosen = least_floats(order[:-1], score, original - allowed)
    if chosen is None:
        raise UserError(
            f"quantize: max_drop={max_drop!r}: with all layers but {order[-1]!r} in float the "
            f"score is {tried[-1].score:.4g}, {original - tried[-1].score:.4g} below the "
            "original's; allow a larger drop, or fine-tune after Quantize without max_drop."
        )
    note(
        {
            "kind": "mixed precision",
            "original": original,
            "allowed": allowed,
            "tried": sorted([each.floats, each.bytes, each.score] for each in tried),
            "layers": [
                [each.weight, each.drop, each.noise, each.saved_bytes, each.weight in chosen]
                for each in ranked
            ],
        }
    )
    return chosen


def _cost_per_byte(each: Sensitivity) -> tuple[float, float]:
    saved = max(1, each.saved_bytes)
    return max(0.0, each.drop) / saved, each.noise / saved


def sensitivities(quantized: Model, task: Task) -> list[Sensitivity]:
    """What each quantized layer costs by itself, on the start of the validation split."""
    runner = Runner(quantized.copy().eval().graph)
    layers = _quantizers_of(quantized)
    lost, errors = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    power, seen = 0.0, 0
    found = list(examples(quantized, task, "validation", EXAMPLES))
    for batch in track(found, "sensitivity of layers"):
        exact, each = runner.alone(batch.inputs, layers)
        exact = batch.cut(exact)
        power += _energy(exact)
        scores = _scores(quantized, task, exact, batch)
        seen += batch.count
        for name in layers:
            made = batch.cut(each.pop(name))
            errors[name] += _energy([a - b for a, b in zip(made, exact, strict=True)])
            lost[name] += float((scores - _scores(quantized, task, made, batch)).sum())
    forms = weight_forms(quantized.graph)
    return [
        Sensitivity(
            name,
            lost[name] / max(1, seen),
            errors[name] / max(power, 1e-30),
            forms[name].saved_bytes(tensor_of(quantized.graph, name).numel()),
        )
        for name in layers
    ]


def mean_score(model: Model, task: Task) -> float:
    """The mean of the task's score over the validation split."""
    runner = Runner(model.copy().eval().graph)
    found = [
        _scores(model, task, batch.cut(runner.outputs(batch.inputs)), batch)
        for batch in examples(model, task, "validation")
    ]
    return float(torch.cat(found).mean())


def _quantizers_of(model: Model) -> dict[str, set[str]]:
    """Weight -> the names of its quantizer and of those that its layers' inputs pass through."""
    held = quantized_weights(model.graph)
    weights = set(held.values())
    rounding = {node for node in quantizers(model.graph) if node not in weights}
    found = {name: {node.name} for name, node in held.items()}
    for site in sites(model.graph):
        if site.weight in found:
            node = site.input
            while node in rounding:
                found[site.weight].add(node.name)
                node = node.args[0]  # type: ignore[assignment]
    return found


def _scores(model: Model, task: Task, outputs: list[Tensor], batch: Batch) -> Tensor:
    output = structure.unflatten(outputs, model.outputs)
    return scored(task, output, batch.target, batch.count)


def _energy(values: Sequence[Tensor]) -> float:
    return sum(float(v.double().square().sum()) for v in values if v.is_floating_point())
