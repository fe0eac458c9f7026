"""Which inner value of the teacher teaches which of the student."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.model import Model
from paredown.graph.taps import read
from paredown.train.distill.inner_values import Stage, View
from paredown.train.distill.losses import linear_cka

MATCHES = ("depth", "cka")
MOST = 4  # stages of a net that has one resolution throughout
EXAMPLES = 256  # of the calibration split, for CKA


@dataclass(frozen=True)
class Pair:
    """A loss between an inner value of the student and one of the teacher, and why these two."""

    loss: str
    student: Stage
    teacher: Stage
    why: str

    def __str__(self) -> str:
        return f"{self.student} from the teacher's {self.teacher}: {self.loss}, {self.why}"


Aligned = Callable[[list[Stage], list[Stage]], list[list[float]]]  # CKA, student x teacher


def pairs(
    loss: str, student: View, teacher: View, layers: Sequence[str], aligned: Aligned | None
) -> list[Pair]:
    """The pairs for one loss: those named in ``layers``, else those found by depth, or by CKA
    where ``aligned`` gives it.

    Raises:
        UserError: a layer does not exist or cannot take part in this loss.
    """
    maps = loss == "attention_maps"
    if layers:
        found = [_named(loss, student, teacher, text, maps) for text in layers]
    elif maps:
        found = _maps(student.attention(), teacher.attention())
    else:
        found = _matched(loss, _fitting(loss, student), _fitting(loss, teacher), aligned)
    for pair in found:
        _check(pair)
    return found


def _named(loss: str, student: View, teacher: View, text: str, maps: bool) -> Pair:
    ours, _, theirs = text.partition("=")
    ends = student.find(ours.strip(), maps), teacher.find((theirs or ours).strip(), maps)
    return Pair(loss, *ends, "as named")


def _maps(ours: list[Stage], theirs: list[Stage]) -> list[Pair]:
    """Each attention of the student with the teacher's at its share of the depth."""
    for whose, found in (("model", ours), ("teacher", theirs)):
        if not found:
            raise UserError(
                f"internal: attention_maps needs attention, and the {whose} has none that can be "
                "seen (scaled_dot_product_attention, or a softmax before a product)."
            )
    chosen = [theirs[round((n + 1) * len(theirs) / len(ours)) - 1] for n in range(len(ours))]
    made = zip(ours, chosen, strict=True)
    return [Pair("attention_maps", a, b, "by order") for a, b in made]


def _fitting(loss: str, view: View) -> list[Stage]:
    """The stages that can take part; those with places where there are some."""
    found = view.stages()
    wide = [stage for stage in found if math.prod(stage.places) > 1]
    if loss == "attention_transfer" and not wide:
        raise UserError(
            f"internal: attention_transfer compares places, and the {view.whose}'s layers give "
            "none (images or sequences); use hints or similarity."
        )
    if not found:
        raise UserError(f"internal: the {view.whose} has no inner value to compare; name layers.")
    return wide or found


def chosen(stages: list[Stage]) -> list[Stage]:
    """The last stage of each resolution; where there is only one, up to four at even steps, of
    those that items of a list of modules give, where there are such."""
    last = {stage.places: stage for stage in stages}
    if len(last) > 1:
        return list(last.values())
    stages = [stage for stage in stages if stage.is_item] or stages
    count = min(MOST, len(stages))
    return [stages[round((n + 1) * len(stages) / count) - 1] for n in range(count)]


def _matched(
    loss: str, ours: list[Stage], theirs: list[Stage], aligned: Aligned | None
) -> list[Pair]:
    learning = chosen(ours)
    if aligned is not None:
        rows = aligned(learning, theirs)
        scored = zip(learning, in_order(rows), rows, strict=True)
        return [Pair(loss, a, theirs[n], f"CKA {row[n]:.2f}") for a, n, row in scored]
    names = [[(stage.node, stage.layer) for stage in side] for side in (ours, theirs)]
    if names[0] == names[1]:  # one made from the other, or of the same design
        same = {stage.node: stage for stage in theirs}
        return [Pair(loss, stage, same[stage.node], "the same layer") for stage in learning]
    return [_by_depth(loss, stage, ours, theirs) for stage in learning]


def in_order(scores: list[list[float]]) -> list[int]:
    """For each row one column, later for later rows where there are enough, of the highest sum.

    Example:
        >>> in_order([[0.9, 0.8, 0.1], [0.9, 0.7, 0.6]])
        [0, 1]
    """
    start: tuple[float, list[int]] = (0.0, [])  # sum and choice so far
    never: tuple[float, list[int]] = (-math.inf, [])
    best, reached = [start] * len(scores[0]), [start]
    for row in scores:
        ahead = enumerate(zip(row, best, strict=True))
        reached = [(total + s, [*way, column]) for column, (s, (total, way)) in ahead]
        tops = list(itertools.accumulate(reached, max))
        best = [never, *tops[:-1]] if len(row) >= len(scores) else tops
    return max(reached)[1]


def _by_depth(loss: str, stage: Stage, ours: list[Stage], theirs: list[Stage]) -> Pair:
    """The teacher's stage of the same resolution, where there are such, and of the nearest depth;
    the last of a resolution learns from the last, and a block from a block."""
    alike = [each for each in theirs if each.places == stage.places] or theirs
    if stage.is_item:
        alike = [each for each in alike if each.is_item] or alike
    is_last = stage is [each for each in ours if each.places == stage.places][-1]
    near = min(alike, key=lambda each: abs(each.depth - stage.depth))
    found = alike[-1] if is_last and alike[-1].places == stage.places else near
    return Pair(loss, stage, found, f"depth {stage.depth:.2f} from {found.depth:.2f}")


def _check(pair: Pair) -> None:
    ours, theirs = pair.student, pair.teacher
    if pair.loss == "attention_maps" and ours.shape[2:] != theirs.shape[2:]:
        raise UserError(
            f"internal: attention_maps compares maps of one size; {ours} of the model and {theirs} "
            "of the teacher see other numbers of tokens."
        )
    if pair.loss == "attention_transfer" and 1 in (math.prod(s.places) for s in (ours, theirs)):
        raise UserError(
            f"internal: attention_transfer compares places; {ours} or the teacher's {theirs} has "
            "none besides its channels."
        )


def some_inputs(model: Model, task: Task, most: int) -> Iterator[Any]:
    """Inputs of batches of the calibration split, about ``most`` examples in all."""
    size = feed.size(model, most, task.batch_size)
    data = splits.split(task, "calibration")
    return (each.inputs for each in feed.every(model, data, size, max(1, most // size)))


def values_of(model: Model, inputs: Any, stages: Sequence[Stage]) -> list[Tensor]:
    """The stages' values for a batch, channels second; nothing is differentiated."""
    leaves = [leaf.clone() for leaf in model.bind(*splits.arguments(inputs))]
    with torch.no_grad():
        found = read(model.graph, leaves, [stage.node for stage in stages])[1]
    return [value.movedim(s.channels, 1) for value, s in zip(found, stages, strict=True)]


def alignment(
    models: Sequence[Model], sides: Sequence[list[Stage]], task: Task
) -> list[list[float]]:
    """Linear CKA of each stage of the first model with each of the second, on the calibration
    split, of the means over places.
    """
    seen: list[list[list[Tensor]]] = [[[] for _ in side] for side in sides]
    for inputs in some_inputs(models[0], task, EXAMPLES):
        for model, side, kept in zip(models, sides, seen, strict=True):
            for value, found in zip(values_of(model, inputs, side), kept, strict=True):
                found.append(value.flatten(2).mean(2) if value.dim() > 2 else value)
    ours, theirs = [[torch.cat(found) for found in side] for side in seen]
    return [[linear_cka(a, b) for b in theirs] for a in ours]
