"""What a student is taught: a training objective made of its teacher's outputs and inner values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_fields
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph import machine, store, structure
from paredown.graph.model import Model
from paredown.graph.taps import read
from paredown.train.distill.inner_values import View
from paredown.train.distill.losses import INTERNAL, LOSSES, OUTPUTS, alike
from paredown.train.distill.matching import MATCHES, Pair, alignment, pairs, some_inputs, values_of
from paredown.train.distill.outputs import Output, described, distinct, outputs_of
from paredown.train.distill.student import check_outputs
from paredown.train.distill.teacher import TAUGHT
from paredown.train.objective import task_loss
from paredown.train.reconstruct import refit

AUTO = "auto"
START = 4096  # places of a batch that an adaptor is fitted on before training
RIDGE = 1e-3


@dataclass(frozen=True)
class Teaching:
    """What is taught, and how much each part weighs.

    Args:
        loss: of the outputs: "softened" (KL at a temperature, arXiv 1503.02531), "decoupled"
            (arXiv 2203.08679) or "squared"; "auto" is "softened" for outputs whose labels are
            classes, else "squared". Each token of a sequence and each pixel counts as an example.
        temperature: by which logits are divided, above 0.
        alpha: share of the task's own loss, 0 to 1; the teacher's outputs have the rest. With 0
            neither labels nor a loss are needed.
        internal: losses between inner values: "hints" (FitNets, arXiv 1412.6550; of a transformer
            its hidden states), "attention_transfer" (arXiv 1612.03928), "similarity" (arXiv
            1907.09682), "attention_maps" of transformers (arXiv 1909.10351).
        beta: weight of the inner values' losses, each a mean over its layers of numbers about 1.
        layers: which layers learn from which, "student=teacher" or one name for both, where the
            names are the modules'; () finds them.
        match: how they are found: "depth" (the last layer of each resolution, else even steps), or
            "cka" (the teacher's most similar layer on calibration data, arXiv 1905.00414).

    Raises:
        UserError: a setting is out of its range.
    """

    loss: str = AUTO
    temperature: float = 4.0
    alpha: float = 0.1
    internal: tuple[str, ...] = ()
    beta: float = 1.0
    layers: tuple[str, ...] = ()
    match: str = "depth"

    def __post_init__(self) -> None:
        check_fields(self)
        _one_of("loss", self.loss, (AUTO, *OUTPUTS))
        for name in self.internal:
            _one_of("internal", name, INTERNAL)
        _one_of("match", self.match, MATCHES)
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature: expected a number above 0, got {self.temperature!r}.")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha: expected a share from 0 to 1, got {self.alpha!r}.")
        if self.alpha == 1 and not self.internal:
            raise UserError("alpha: 1 leaves nothing to the teacher; lower it, or set internal.")
        if not 0 <= self.beta < math.inf:
            raise UserError(f"beta: expected a weight from 0 up, got {self.beta!r}.")
        if self.layers and not self.internal:
            raise UserError("layers: only the losses of internal compare layers; set internal too.")
        for text in self.layers:
            parts = [part.strip() for part in str(text).split("=")]
            if not all(parts) or len(parts) > 2:
                raise UserError(f'layers: expected "student=teacher" or one name, got {text!r}.')


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        spelled = ", ".join(f'"{each}"' for each in allowed)
        raise UserError(f"{name}: expected one of {spelled}, got {value!r}.")


@dataclass
class Lesson:
    """The objective: the teacher's outputs, inner values and the task's loss, weighed together.

    ``extra`` holds the adaptors, ``weight`` (D, C) and ``bias`` (D,) for each pair of `hints` whose
    channels are not the same: they bring the student's channels to the teacher's.
    """

    teacher: Model
    task: Task
    how: Teaching
    outputs: list[Output]
    pairs: list[Pair]
    extra: dict[str, nn.Parameter] = field(default_factory=dict)

    def mark(self) -> str:
        told = [str(pair) for pair in self.pairs], [output.ignore for output in self.outputs]
        return f"{asdict(self.how)} {told} {store.digest(self.teacher)}"

    def to(self, device: torch.device) -> None:
        machine.move(self.teacher, device)
        for name, tensor in self.extra.items():
            self.extra[name] = nn.Parameter(tensor.detach().to(device))

    def says(self, inputs: Any) -> list[Tensor]:
        """The teacher's outputs, and its inner values as they are, for a batch."""
        leaves = [leaf.clone() for leaf in self.teacher.bind(*splits.arguments(inputs))]
        with torch.no_grad():
            found = read(self.teacher.graph, leaves, [pair.teacher.node for pair in self.pairs])
        return [found[0][output.index] for output in self.outputs] + found[1]

    def values(self, model: Model, inputs: Any, target: Any) -> list[Tensor]:
        """The model's outputs and inner values, and what the teacher says beside them."""
        taught = target.get(TAUGHT) if isinstance(target, dict) else None
        theirs = self.says(inputs) if taught is None else taught
        leaves = model.bind(*splits.arguments(inputs))
        outputs, inner = read(model.graph, leaves, [pair.student.node for pair in self.pairs])
        return [*outputs, *inner, *theirs]

    def loss(self, model: Model, values: list[Tensor], target: Any) -> Tensor:
        if isinstance(target, dict) and TAUGHT in target:
            target = target.get("target")
        count, inside = len(self.outputs), len(self.pairs)
        ours, theirs = values[: -count - inside], values[-count - inside :]
        outputs, inner = ours[: len(ours) - inside], ours[len(ours) - inside :]
        loss = torch.zeros((), device=outputs[0].device)
        if self.how.alpha < 1:
            loss = (1 - self.how.alpha) * self._outputs(outputs, theirs[:count], target)
        if self.pairs:
            loss = loss + self.how.beta * self._inner(inner, theirs[count:])
        if self.how.alpha > 0:
            self._check_labels(target)
            output = structure.unflatten(outputs, model.outputs)
            loss = loss + self.how.alpha * task_loss(self.task, output, target)
        return loss

    def __call__(self, model: Model, inputs: Any, target: Any) -> Tensor:
        return self.loss(model, self.values(model, inputs, target), target)

    def _outputs(self, ours: list[Tensor], theirs: list[Tensor], target: Any) -> Tensor:
        """The sum over the outputs."""
        labels = structure.flatten(target)[0]
        losses = []
        for output, teacher in zip(self.outputs, theirs, strict=True):
            label = None if output.label is None or not labels else labels[output.label]
            losses.append(_of_output(output, ours[output.index], teacher, label, self.how))
        return torch.stack(losses).sum()

    def _inner(self, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
        """The sum over the losses of their means over the pairs."""
        found: dict[str, list[Tensor]] = {}
        for number, (pair, a, b) in enumerate(zip(self.pairs, ours, theirs, strict=True)):
            if pair.loss != "attention_maps":
                a, b = a.movedim(pair.student.channels, 1), b.movedim(pair.teacher.channels, 1)
            if pair.loss in ("hints", "attention_transfer"):
                a, b = alike(a, b)
            if f"{number}.weight" in self.extra:
                a = _adapted(a, self.extra[f"{number}.weight"], self.extra[f"{number}.bias"])
            found.setdefault(pair.loss, []).append(LOSSES[pair.loss](a, b))
        return torch.stack([torch.stack(each).mean() for each in found.values()]).sum()

    def _check_labels(self, target: Any) -> None:
        if target is None:
            raise UserError(
                f"alpha: {self.how.alpha} of the loss is the task's, which needs labels, and the "
                "train split has none; set alpha=0 to learn from the teacher alone."
            )


def _adapted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map of the channels, a 1x1 convolution: (B, C, *places) -> (B, D, *places)."""
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def _of_output(
    output: Output, ours: Tensor, theirs: Tensor, label: Tensor | None, how: Teaching
) -> Tensor:
    """The loss of one output; examples, tokens and pixels whose label is ignored do not count."""
    if output.loss == "squared" or output.classes is None:
        return LOSSES["squared"](ours, theirs)
    rows = [t.movedim(output.classes, -1).flatten(0, -2) for t in (ours, theirs)]  # (N, C)
    if label is not None:
        label = label.flatten().long()  # (N,)
        counts = ~torch.isin(label, torch.tensor(output.ignore, device=label.device))
        rows, label = [t[counts] for t in rows], label[counts]
        _check_range(label, rows[0].shape[-1])
        if not len(label):
            return ours.sum() * 0.0
    return LOSSES[output.loss](*rows, label, how.temperature)


def _check_range(label: Tensor, classes: int) -> None:
    wrong = label[(label < 0) | (label >= classes)]
    if len(wrong):
        raise UserError(
            f"task: a label of the train split is {int(wrong[0])}, and the classes are 0 to "
            f"{classes - 1}; say with Task(ignore={int(wrong[0])}) that it does not count."
        )


# --- the start -------------------------------------------------------------------------------


def prepare(teacher: Model, student: Model, task: Task, how: Teaching, related: bool) -> Lesson:
    """What the teacher teaches this student, told to whoever watches.

    ``related``: the student was made from this teacher, so that channels which are as many in both
    are the same ones and need no adaptor.

    Raises:
        UserError: the outputs differ, a layer does not exist, or a loss does not fit the models.
    """
    split = splits.split(task, "train")
    size = feed.size(student, 4, splits.size(split))
    [batch] = feed.every(student, split, size, 1)
    views, found = [], []
    for model, whose in ((student, "model"), (teacher, "teacher")):
        leaves = _bound(model, batch.inputs, whose, size)
        views.append(View(model, leaves, whose))
        with torch.no_grad():
            found.append(list(model.graph(*[leaf.clone() for leaf in leaves])))
    check_outputs(student, found[0], teacher, found[1])
    target, values = _labels(task, batch.target, size)
    given = splits.ignored(task)
    outputs = outputs_of(student, views[0], found[0], target, how.loss, values, given)
    if batch.target is None:  # the labels of another split told only what the outputs are
        outputs = [replace(output, label=None) for output in outputs]
    progress.say(f"  learning {described(outputs, how.temperature)}")
    lesson = Lesson(teacher, task, how, outputs, _pairs(views, student, teacher, task, how))
    for pair in lesson.pairs:
        progress.say(f"  learning {pair}")
    with torch.random.fork_rng(devices=[]):  # for dropout, and which places
        torch.manual_seed(0)
        lesson.extra.update(_adaptors(lesson, student, related))
    return lesson


def _bound(model: Model, inputs: Any, whose: str, size: int) -> list[Tensor]:
    if model.fixed_batch not in (None, size):
        raise UserError(
            f"{whose}: takes batches of {model.fixed_batch} only, the other model of {size}; "
            "capture both for the same batch."
        )
    try:
        return model.bind(*splits.arguments(inputs))
    except UserError as error:
        raise UserError(f"{whose}: {error}") from error


def _labels(task: Task, target: Any, size: int) -> tuple[Any, list[list[int]]]:
    """The target, and all whole numbers that each of its tensors holds over the split; where the
    training data have none, those that the score is made on."""
    data = task.train
    if target is None and task.validation is not None:
        data, target = task.validation, next(splits.batches(task.validation, size))[1]
    seen: list[set[int]] = [set() for _ in structure.flatten(target)[0]]
    if seen and data is not None:
        for _, each in splits.batches(data, task.batch_size):
            for found, label in zip(seen, structure.flatten(each)[0], strict=True):
                found.update(distinct(label))
    return target, [sorted(found) for found in seen]


def _pairs(
    views: list[View], student: Model, teacher: Model, task: Task, how: Teaching
) -> list[Pair]:
    aligned = None
    if how.match == "cka":
        aligned = lambda ours, theirs: alignment([student, teacher], [ours, theirs], task)  # noqa: E731
    ours, theirs = views
    return [p for loss in how.internal for p in pairs(loss, ours, theirs, how.layers, aligned)]


def _adaptors(lesson: Lesson, student: Model, related: bool) -> dict[str, nn.Parameter]:
    """Adaptors for the hints, fitted by least squares to what both models give before training."""
    needed = {
        number: pair
        for number, pair in enumerate(lesson.pairs)
        if pair.loss == "hints" and (not related or pair.student.width != pair.teacher.width)
    }
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {number: [] for number in needed}
    training = student.copy().train()  # in which an untrained batch norm is another than later
    for inputs in some_inputs(student, lesson.task, 64) if needed else ():
        ours = values_of(training, inputs, [pair.student for pair in needed.values()])
        theirs = values_of(lesson.teacher, inputs, [pair.teacher for pair in needed.values()])
        for number, a, b in zip(needed, ours, theirs, strict=True):
            x, y = (_places(value) for value in alike(a, b))  # (N, C), (N, D)
            chosen = torch.randperm(len(x))[:START]
            rows[number].append((x[chosen], y[chosen]))
    made = {}
    for number, found in rows.items():
        x, y = (torch.cat(side) for side in zip(*found, strict=True))
        start = x.new_zeros(y.shape[1], x.shape[1]), x.new_zeros(y.shape[1])
        weight, bias = refit(x, y, *start, RIDGE)
        assert bias is not None
        made[f"{number}.weight"] = nn.Parameter(weight.to(x.dtype))
        made[f"{number}.bias"] = nn.Parameter(bias.to(x.dtype))
    return made


def _places(x: Tensor) -> Tensor:
    """(B, C, *places) -> (N, C)."""
    return x.movedim(1, -1).flatten(0, -2)
