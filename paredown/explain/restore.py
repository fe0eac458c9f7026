"""What is won by giving one layer back what was taken from it, measured layer by layer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from paredown.core import progress
from paredown.core.task import Task
from paredown.data.evaluate import scored
from paredown.data.feed import Batch
from paredown.explain.layers import Layer, folded
from paredown.explain.noise import Outputs
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.graph.quantized.quantizers import quantized_weights, quantizers, weight_forms
from paredown.graph.quantized.regions import find_regions
from paredown.graph.quantized.runner import Edge, Runner, all_quantizers, without_quantizers
from paredown.graph.state import getattr_or_none, tensor_of

MOST = 48  # evaluations; a longer model is first tried in blocks of layers
BLOCKS = 24


@dataclass(frozen=True)
class Candidate:
    """Layers that get back what was taken from them.

    Attributes:
        passed: the quantizers that would not be there without these layers'.
        edges: quantizers and ops that would not read them.
        weights: parameter name -> the weights with what was pruned.
        cost_bytes: by how much the file's weights would grow.
    """

    layers: tuple[str, ...]
    passed: frozenset[str] = frozenset()
    edges: frozenset[Edge] = frozenset()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    cost_bytes: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a graph does on some examples.

    Attributes:
        output_db: of its outputs, beside those that they should be.
        score, loss: means over the examples; None where the task has none or no targets.
    """

    output_db: float | None
    score: float | None
    loss: float | None


@dataclass
class _Tally:
    """Of one graph, summed over batches."""

    outputs: Outputs = field(default_factory=Outputs)
    score: float | None = 0.0
    loss: float | None = 0.0
    examples: int = 0

    def add(
        self, outputs: Sequence[Tensor], reference: Sequence[Tensor], found: tuple[Any, Any], n: int
    ) -> None:
        self.outputs.add(reference, outputs)
        score, loss = found
        self.score = None if score is None or self.score is None else self.score + score * n
        self.loss = None if loss is None or self.loss is None else self.loss + loss * n
        self.examples += n

    def outcome(self) -> Outcome:
        n = max(1, self.examples)
        score = None if self.score is None else self.score / n
        return Outcome(self.outputs.db, score, None if self.loss is None else self.loss / n)


class Rounding:
    """What of a graph's rounding belongs to which layers."""

    def __init__(self, compressed: Model, layers: Sequence[Layer]):
        self._graph = compressed.graph
        self._weights = quantized_weights(compressed.graph)
        self._forms = weight_forms(compressed.graph)
        self._stripped = without_quantizers(compressed)
        self._float = {layer.name for layer in layers} - set(self._weights)
        self._quantizers = {
            node.all_input_nodes[0].name: node
            for node in quantizers(compressed.graph)
            if node not in self._weights.values()
        }
        self._whole = self._readers(set())

    def _readers(self, layers: set[str]) -> dict[str, set[str] | None]:
        """Values that pass through integers while these layers stay in float -> who reads them
        so; None where all do."""
        regions = find_regions(self._stripped, self._float | layers)
        found: dict[str, set[str] | None] = {}
        for node in (*regions.own, *regions.shared):
            takers = regions.takers.get(node)
            found[node.name] = None if takers is None else {taker.name for taker in takers}
        return found

    def candidate(self, layers: Sequence[str]) -> Candidate:
        """These layers in float, as if they had been excluded."""
        left = self._readers(set(layers))
        passed = {self._weights[name].name for name in layers}
        edges: set[Edge] = set()
        for name in self._whole:
            quantizer = self._quantizers.get(name)
            if quantizer is not None and name not in left:
                passed.add(quantizer.name)
            elif quantizer is not None and (readers := left[name]) is not None:
                others = (user.name for user in quantizer.users if user.name not in readers)
                edges |= {(quantizer.name, user) for user in others}
        cost = sum(self._cost(name) for name in layers)
        return Candidate(tuple(layers), frozenset(passed), frozenset(edges), {}, cost)

    def _cost(self, name: str) -> int:
        return self._forms[name].saved_bytes(tensor_of(self._graph, name).numel())


class Pruning:
    """The weights of a graph with those back that were pruned."""

    def __init__(self, compressed: Model, original: Model, layers: Sequence[Layer]):
        self._compressed = compressed
        norms = {layer.name for layer in layers if _normed(layer.chain)}
        self._old: dict[str, Tensor] = {}
        unfolded, folds = original.graph, folded(original).graph
        for name, mask in compressed.masks.items():
            source = unfolded if name in norms else folds
            old = getattr_or_none(source, name)
            if isinstance(old, Tensor) and (old := self._cut(name, old)).shape == mask.shape:
                self._old[name] = old.detach()

    @property
    def layers(self) -> list[str]:
        return list(self._old)

    def _cut(self, name: str, old: Tensor) -> Tensor:
        for dim, kept in self._compressed.kept.get(name, {}).items():
            old = old.index_select(dim, kept)
        return old

    def candidate(self, layers: Sequence[str]) -> Candidate:
        """These layers with their pruned weights as they were; a file stores zeros in full."""
        weights = {
            name: torch.where(
                self._compressed.masks[name],
                tensor_of(self._compressed.graph, name).detach(),
                self._old[name],
            )
            for name in layers
        }
        return Candidate(tuple(layers), weights=weights)


def _normed(chain: Sequence[fx.Node]) -> bool:
    return any(node.target is torch.ops.aten.batch_norm.default for node in chain)


@dataclass(frozen=True)
class Ranking:
    """What restoring layers gives, most won first.

    Attributes:
        original: the model as the user brought it.
        exact: the model that nothing was taken from that could be restored: the compressed one
            without rounding, or the original; its outputs are the reference of all.
        compressed: the model as it is.
        restored: candidates with their outcomes; blocks of layers where there are many.
        layers: how many layers could be restored.
        examples: that every outcome was measured on.
    """

    original: Outcome
    exact: Outcome
    compressed: Outcome
    restored: list[tuple[Candidate, Outcome]]
    layers: int
    examples: int


def rank(
    original: Runner,
    runner: Runner,
    taken: Rounding | Pruning,
    names: Sequence[str],
    found: Sequence[Batch],
    task: Task,
    outputs: structure.Structure,
    seconds: float,
) -> Ranking:
    """Restore one layer after another and measure outputs, score and loss.

    At most `MOST` evaluations: a longer model is first tried in blocks of consecutive layers, then
    layer by layer within the best blocks. As many of the examples are used as ``seconds`` allow,
    one batch at least; and as many layers, the first of ``names`` first.

    Args:
        original, runner: of the original and of the compressed graph.
        names: the layers, the likeliest first.
    """
    trial = _Trial(original, runner, isinstance(taken, Rounding), task, outputs)
    began = time.monotonic()
    trial.run(found[:1], [])
    took = max(time.monotonic() - began, 1e-6) / 3  # of one pass; at most three graphs were run
    passes = max(1, int((seconds - 3 * took) / took))  # what is left of the time
    ordered = list(names)
    singles = len(ordered) <= MOST
    groups = [[name] for name in ordered] if singles else _blocks(ordered, runner)
    groups = groups[:passes]
    each = len(groups) + 3  # passes over a batch: also of the three that they are compared with
    batches = found[: max(1, passes // (each if singles else 2 * each))]
    ranking = trial.run(batches, [taken.candidate(group) for group in groups])
    if not singles:
        best = [name for one, _ in _sorted(ranking.restored) for name in one.layers]
        lone = [taken.candidate([name]) for name in best[: MOST - len(groups)]]
        ranking = trial.run(batches, lone)
    return dataclasses.replace(ranking, restored=_sorted(ranking.restored), layers=len(names))


def _blocks(names: Sequence[str], runner: Runner) -> list[list[str]]:
    """The layers in the order they run, cut into `BLOCKS`."""
    places = {str(n.target): k for k, n in enumerate(runner.source.graph.nodes)}
    ordered = sorted(names, key=lambda name: places[name])
    size = -(-len(ordered) // BLOCKS)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _sorted(found: list[tuple[Candidate, Outcome]]) -> list[tuple[Candidate, Outcome]]:
    return sorted(found, key=lambda each: -(each[1].output_db or 0.0))


@dataclass
class _Trial:
    """Runs graphs side by side on the same batches."""

    original: Runner
    runner: Runner
    rounded: bool
    task: Task
    outputs: structure.Structure

    def run(self, found: Sequence[Batch], candidates: Sequence[Candidate]) -> Ranking:
        original, exact, tallies = _Tally(), _Tally(), [_Tally() for _ in (None, *candidates)]
        unrounded = all_quantizers(self.runner.source)
        total = len(found) * len(tallies)
        bar = progress.track(range(total), "restore layers", total)
        for batch in found:
            leaves, count = batch.inputs, batch.count
            whole = wanted = batch.cut(self.original.outputs(leaves))
            if self.rounded:
                wanted = batch.cut(self.runner.outputs(leaves, unrounded))
            original.add(whole, wanted, self._scored(whole, batch), count)
            exact.add(wanted, wanted, self._scored(wanted, batch), count)
            for one, tally in zip((Candidate(()), *candidates), tallies, strict=True):
                next(bar)
                mine = self.runner.outputs(leaves, one.passed, one.weights, edges=one.edges)
                mine = batch.cut(mine)
                tally.add(mine, wanted, self._scored(mine, batch), count)
        next(bar, None)  # the bar is full: let it go
        now, *others = (tally.outcome() for tally in tallies)
        restored = list(zip(candidates, others, strict=True))
        return Ranking(original.outcome(), exact.outcome(), now, restored, 0, exact.examples)

    def _scored(self, outputs: list[Tensor], batch: Batch) -> tuple[float | None, float | None]:
        """Mean score and loss of a batch."""
        if batch.target is None:
            return None, None
        output = structure.unflatten(outputs, self.outputs)
        score = loss = None
        if self.task.score is not None:
            score = float(scored(self.task, output, batch.target, batch.count).mean())
        if self.task.loss is not None:
            loss = float(self.task.loss(output, batch.target))
        return score, loss
