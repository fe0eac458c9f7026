"""What of a model's outputs is its answer, and how an answer is scored and taught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import fidelity, scores
from paredown.data.fidelity import Found
from paredown.graph import structure

MASK = "mask"  # the key of a target that says which places count
IGNORE = scores.IGNORE


@dataclass(frozen=True)
class Answer:
    """The outputs that count, and how they are read.

    Attributes:
        kind: of `paredown.core.task.KINDS`.
        places: of the outputs among the model's tensors; of a detector boxes, scores and classes,
            the last only where it has them.
        dim: of the classes.
        probabilities: whether classes come as these, not as logits.
        scales: of each output of numbers, the size below which an error is not relative.
        corners: whether boxes are two corners, not a centre with width and height.
        mask: the input that says which places count; "" where there is none.
    """

    kind: str
    places: tuple[int, ...]
    dim: int = 1
    probabilities: bool = False
    scales: tuple[float, ...] = ()
    corners: bool = True
    mask: str = ""

    @property
    def threshold(self) -> float:
        """Above which one number is the second class."""
        return 0.5 if self.probabilities else 0.0

    def of(self, output: Any) -> list[Tensor]:
        """The outputs that count."""
        leaves = structure.flatten(output)[0]
        return [leaves[place] for place in self.places]

    def target(self, outputs: Sequence[Tensor], mask: Tensor | None) -> Any:
        """The original's answer as a split has it: a tensor, or a dict where there are several."""
        if len(outputs) == 1 and mask is None:
            return outputs[0]
        named = {str(place): each for place, each in enumerate(outputs)}
        return named if mask is None else named | {MASK: mask}

    def taught(self, target: Any) -> tuple[list[Tensor], Tensor | None]:
        """What `target` put together."""
        if isinstance(target, Tensor):
            return [target], None
        return [target[str(place)] for place in range(len(self.places))], target.get(MASK)

    def boxes(self, parts: Sequence[Tensor]) -> list[Found]:
        """A detector's boxes by corners, with score and class, of each example."""
        boxes, rated = parts[0].float(), parts[1].float()
        if not self.corners:
            centre, half = boxes[..., :2], boxes[..., 2:] / 2
            boxes = torch.cat([centre - half, centre + half], -1)
        if len(parts) > 2:
            return list(zip(boxes, rated, parts[2], strict=True))
        if rated.dim() == 2:
            return list(zip(boxes, rated, torch.zeros_like(rated), strict=True))
        if not self.probabilities:  # the last class of such outputs is that there is nothing
            rated = rated.softmax(-1)[..., :-1]
        best = rated.max(-1)
        return list(zip(boxes, best.values, best.indices, strict=True))


# --- fidelity ----------------------------------------------------------------------------------

MEANINGS = {
    "classification": "same top class",
    "segmentation": "pixels of the same class",
    "tokens": "tokens of the same top class",
    "embedding": "cosine",
    "regression": "1 less the relative error",
    "detection": "boxes that match",
}


@dataclass(frozen=True)
class Fidelity:
    """How far an answer is the original's: (B,) from 0 to 1, 1 where it is the same.

    Example:
        >>> score = Fidelity(Answer("classification", (0,)))
        >>> score(torch.eye(2), torch.tensor([[2.0, 1.0], [2.0, 1.0]])).tolist()
        [1.0, 0.0]
    """

    answer: Answer
    notes: tuple[str, ...] = ()  # on how the task was made
    labelled: ClassVar[bool] = False

    @property
    def meaning(self) -> str:
        return f"fidelity to the original: {MEANINGS[self.answer.kind]}"

    def __call__(self, output: Any, target: Any) -> Tensor:
        answer, got = self.answer, self.answer.of(output)
        wanted, mask = answer.taught(target)
        if answer.kind == "detection":
            return fidelity.box_agreement(answer.boxes(got), answer.boxes(wanted))
        if answer.kind == "embedding":
            return fidelity.cosine_agreement(got[0], wanted[0], mask)
        if answer.kind == "regression":
            pairs = zip(got, wanted, answer.scales, strict=True)
            return torch.stack([fidelity.closeness(*each) for each in pairs]).mean(0)
        return fidelity.class_agreement(got[0], wanted[0], answer.dim, mask, answer.threshold)


@dataclass(frozen=True)
class FidelityLoss:
    """How far an answer is from the original's, to train by: the divergence of classes, else the
    squared error, of each output over the square of its usual size.

    Example:
        >>> loss = FidelityLoss(Answer("regression", (0,), scales=(2.0,)))
        >>> float(loss(torch.tensor([[3.0]]), torch.tensor([[1.0]])))
        1.0
    """

    answer: Answer

    def __call__(self, output: Any, target: Any) -> Tensor:
        answer, got = self.answer, self.answer.of(output)
        wanted, mask = answer.taught(target)
        if answer.kind in ("classification", "segmentation", "tokens"):
            return fidelity.divergence(got[0], wanted[0], answer.dim, answer.probabilities, mask)
        scales = answer.scales or (1.0,) * len(got)
        pairs = [p for p in zip(got, wanted, scales, strict=True) if p[0].is_floating_point()]
        return torch.stack([F.mse_loss(a / s, b / s) for a, b, s in pairs]).mean()


def answer_from(task: Task) -> Answer | None:
    """The answer of a task that was made from samples; None of a user's own."""
    return task.score.answer if isinstance(task.score, (Fidelity, LabelScore)) else None


def notes_of(task: Task) -> tuple[str, ...]:
    """What was done to make a task from samples, in sentences.

    Example:
        >>> notes_of(Task((torch.zeros(1),), score=scores.accuracy))
        ()
    """
    return task.score.notes if isinstance(task.score, (Fidelity, LabelScore)) else ()


def fidelity_note(task: Task) -> tuple[str, ...]:
    """That the score of a task is no accuracy, in a sentence; nothing where it is one."""
    told = "The score is fidelity to the original, not accuracy."
    return (told,) if isinstance(task.score, Fidelity) else ()


def by_labels(task: Task) -> Task:
    """The task with its score by labels, as they come late from outside, in place of fidelity.

    Raises:
        UserError: labels say nothing of such an answer.
    """
    if not isinstance(task.score, Fidelity):
        return task
    answer = task.score.answer
    if answer.kind not in LABELLED:
        raise UserError(f"task: outputs of {answer.kind} are not scored by labels.")
    return replace(task, score=LabelScore(answer), loss=None)


# --- labels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelScore:
    """How right an answer is by its label: (B,), higher is better.

    Example:
        >>> score = LabelScore(Answer("classification", (0,)))
        >>> score.meaning, score(torch.eye(2), torch.tensor([0, 0])).tolist()
        ('accuracy', [1.0, 0.0])
    """

    answer: Answer
    notes: tuple[str, ...] = ()  # on how the task was made
    labelled: ClassVar[bool] = True

    @property
    def meaning(self) -> str:
        return LABELLED[self.answer.kind][0]

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        [got] = self.answer.of(output)
        return LABELLED[self.answer.kind][1](got, target, self.answer)


def _accuracy(output: Tensor, target: Tensor, answer: Answer) -> Tensor:
    """The share of places whose class is the label; labels that are no class do not count."""
    right = fidelity.classes_of(output, answer.dim, answer.threshold)
    right = right.reshape(len(right), -1) == target.reshape(len(target), -1)
    counts = _counts(output, target, answer).reshape(len(target), -1)
    total = counts.sum(1)
    return torch.where(total > 0, (right & counts).sum(1) / total.clamp(min=1), 1.0)


def _counts(output: Tensor, target: Tensor, answer: Answer) -> Tensor:
    return (target >= 0) & (target < max(2, output.shape[answer.dim]))


def _error(output: Tensor, target: Tensor, answer: Answer) -> Tensor:
    return scores.squared_error(output.float(), target.float())


LABELLED: dict[str, tuple[str, Callable[[Tensor, Tensor, Answer], Tensor]]] = {
    "classification": ("accuracy", _accuracy),
    "segmentation": ("the share of pixels that are right", _accuracy),
    "tokens": ("the share of tokens that are right", _accuracy),
    "regression": ("minus the mean squared error", _error),
}


@dataclass(frozen=True)
class LabelLoss:
    """How wrong an answer is by its label, to train by: cross entropy, or the squared error.

    Example:
        >>> loss = LabelLoss(Answer("classification", (0,), probabilities=True))
        >>> round(float(loss(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))), 4)
        0.6931
    """

    answer: Answer

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        [got] = self.answer.of(output)
        if self.answer.kind == "regression":
            return F.mse_loss(got.float(), target.reshape(got.shape).float())
        told = fidelity.logs(got, self.answer.dim, self.answer.probabilities)
        told = told.movedim(self.answer.dim, -1).flatten(0, -2)
        counts = _counts(got, target, self.answer)
        return F.nll_loss(told, torch.where(counts, target, IGNORE).flatten(), ignore_index=IGNORE)
