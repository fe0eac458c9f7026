"""What one output for every input scores: a model that is no better is of no use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Subset

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.data.evaluate import scored
from paredown.data.feed import Feed
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.measure import stats

EXAMPLES = 256  # at most, spread over the split
CLASSES = 65536  # as many labels are counted


@dataclass(frozen=True)
class Constant:
    """The best output that is the same for every input: its score of each example that was looked
    at, (N,), and which these are."""

    scores: Tensor
    examples: list[int]

    def as_good(self, scores: Tensor) -> bool:
        """Whether scores of the whole split, (M,), cannot be told from it or are worse."""
        seen = scores[self.examples]
        return stats.paired_difference(self.scores.numpy(), seen.numpy()).low <= 0

    @property
    def mean(self) -> float:
        return float(self.scores.mean())


def best_constant(model: Model, task: Task, split: str) -> Constant | None:
    """The best of the outputs' mean, the most frequent class and the targets' mean, as far as the
    task has them; None where outputs vary in shape, or none of these can be scored."""
    data = splits.split(task, split)
    count = splits.size(data)
    chosen = [n * count // min(count, EXAMPLES) for n in range(min(count, EXAMPLES))]
    few = Subset(data, chosen)
    given = feed.every(model, few, feed.size(model, task.batch_size))
    found = []
    for output in _candidates(model, given):
        try:
            found.append(torch.cat(list(_scores(output, model, task, given))))
        except UserError:  # a score need not take what no model gives
            continue
    if not found:
        return None
    return Constant(max(found, key=lambda scores: float(scores.mean())), chosen)


def _candidates(model: Model, given: Feed) -> Iterator[list[Tensor]]:
    """Outputs for one example, without the batch."""
    outputs: list[Tensor] = []  # sums over the examples
    wanted: Tensor | None = None  # likewise
    counts = torch.zeros(CLASSES, dtype=torch.long)
    shapes, targets = set(), set()
    for batch in given:
        with torch.no_grad():
            found = batch.cut(list(model.graph(*model.bind(*splits.arguments(batch.inputs)))))
        labels = structure.flatten(batch.target)[0]
        shapes.add(tuple(t.shape[1:] for t in found))
        targets.add(tuple(t.shape[1:] for t in labels))
        if len(shapes) > 1 or any(not t.dim() for t in found):
            return
        sums = [t.detach().cpu().double().sum(0) for t in found]
        outputs = [a + b for a, b in zip(outputs, sums, strict=True)] if outputs else sums
        if len(targets) == len(labels) == 1 and labels[0].is_floating_point():
            total = labels[0].double().sum(0)
            wanted = total if wanted is None else wanted + total
        elif len(targets) == len(labels) == 1:
            known = labels[0].flatten().long()
            counts += known[(known >= 0) & (known < CLASSES)].bincount(minlength=CLASSES)
    examples = splits.size(given.data)
    yield [total / examples for total in outputs]
    if len(outputs) == 1 and len(targets) == 1:
        yield from _of_labels(outputs[0].shape, next(iter(targets)), wanted, counts, examples)


def _of_labels(
    shape: torch.Size,
    targets: tuple[torch.Size, ...],
    wanted: Tensor | None,
    counts: Tensor,
    examples: int,
) -> Iterator[list[Tensor]]:
    """Of one output of that shape: the targets' mean, or the most frequent class."""
    if wanted is not None and wanted.numel() == shape.numel():
        yield [(wanted / examples).reshape(shape)]
    if not counts.any() or len(shape) != len(targets[0]) + 1:
        return
    for dim in {0, len(shape) - 1}:
        if targets[0] == shape[:dim] + shape[dim + 1 :] and counts[: shape[dim]].any():
            output = torch.zeros(shape)
            output.select(dim, int(counts[: shape[dim]].argmax())).fill_(1.0)
            yield [output]


def _scores(output: list[Tensor], model: Model, task: Task, given: Feed) -> Iterator[Tensor]:
    for batch in given:
        leaves = [leaf.float().expand(batch.count, *leaf.shape).clone() for leaf in output]
        told = structure.unflatten(leaves, model.outputs)
        yield scored(task, told, batch.target, batch.count)
