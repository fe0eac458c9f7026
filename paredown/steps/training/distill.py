"""Distillation: train a student to give what its teacher gives, inside too."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph.model import Model
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.train.distill.lesson import Teaching, prepare
from paredown.train.distill.teacher import ORIGINAL, check_file, find, keep, room
from paredown.train.loop import fit
from paredown.train.settings import Training


@dataclass(frozen=True)
class Distill(Step):
    """Train the model on what a teacher says of the task's training data, labelled or not.

    The settings are those of `paredown.train.distill.lesson.Teaching` (what is taught) and
    `paredown.train.settings.Training` (how), and these:

    Args:
        teacher: "original", the model that the recipe started from, or a file: a saved model
            (.safetensors, .pt2) or a Python file that defines ``model()``, so that a small
            architecture of one's own can be the student. A .py or .pt2 file is code: name only
            those that you trust.
        cache: ask the teacher once about each example and keep what it says on disk, for data
            that are the same in every epoch.

    It pays where few examples are labelled: on the digits, with 100 labels, a student of a tenth
    of the parameters came from 89.2 to 97.2 %, and to 98.3 % with
    ``internal=("attention_transfer",)`` (docs/distillation.md). It does not pay with too few
    steps: with half of them it was worse than training alone. Each step costs the teacher's
    forward pass besides.

    Pruned weights stay zero, and the quantizers of a quantized model train as with `FineTune`.

    Raises:
        UserError: a setting is out of its range, the teacher's outputs are others than the
            model's, a layer does not exist, or ``cache`` is set and the data vary.

    Example:
        >>> import paredown
        >>> Distill(alpha=0).needs == {"train"}, sorted(Distill().needs)
        (True, ['loss', 'train'])
        >>> Distill(temperature=0)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: temperature: expected a number above 0, got 0.
    """

    # what an instance needs depends on alpha, and shadows this
    needs: ClassVar[frozenset[str]] = frozenset({"train"})
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="Distill()",
            does="trains the compressed model, or a small one of your own, on what the original "
            "or a bigger model says of the training data, labelled or not; inner values too",
            pays="few labels, and more data than labels: 8 points on digits",
            does_not="few steps: the student learns more slowly at first, and each step costs the "
            "teacher's forward pass",
        ),
    )

    teacher: str = ORIGINAL
    cache: bool = False
    # the names again, so that a recipe stays flat; defaults and checks are Teaching's
    loss: str = Teaching.loss
    temperature: float = Teaching.temperature
    alpha: float = Teaching.alpha
    internal: tuple[str, ...] = Teaching.internal
    beta: float = Teaching.beta
    layers: tuple[str, ...] = Teaching.layers
    match: str = Teaching.match
    # and Training's
    epochs: float = Training.epochs
    optimizer: str = Training.optimizer
    lr: float = Training.lr
    momentum: float = Training.momentum
    weight_decay: float = Training.weight_decay
    warmup: float = Training.warmup
    clip_norm: float | None = Training.clip_norm
    batch_size: int | None = Training.batch_size
    group_lasso: float = Training.group_lasso
    quantizers: str = Training.quantizers
    patience: int | None = Training.patience
    zeros: str = Training.zeros
    seed: int = Training.seed
    device: str = Training.device

    def __post_init__(self) -> None:
        self.teaching()
        self.training()
        needs = {"train", "loss"} if self.alpha > 0 else {"train"}
        object.__setattr__(self, "needs", frozenset(needs))

    def teaching(self) -> Teaching:
        return Teaching(**self._settings(Teaching))

    def training(self) -> Training:
        return Training(**self._settings(Training))

    def _settings(self, kind: Any) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(kind)}

    def problems(self) -> list[str]:
        """What would stop it later, seen before any work."""
        return list(filter(None, [check_file(self.teacher)]))

    def files(self) -> list[str]:
        """What it reads besides the task, on which a run's result depends."""
        return [] if self.teacher == ORIGINAL else [self.teacher]

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        lacking = task.missing(self.needs)
        if lacking:
            raise UserError(f"Distill: needs {' and '.join(lacking)} of the task.")
        student = model.copy()
        found = find(self.teacher, setting.original or student, task)
        lesson = prepare(found, student, task, self.teaching(), self.teacher == ORIGINAL)
        folder = setting.scratch
        with room(folder) as place:
            if self.cache:
                data, size = splits.split(task, "train"), feed.size(student, task.batch_size)
                given = feed.every(student, data, size)
                task = replace(task, train=keep(given, lesson.says, place))
            checkpoint = folder and folder / "distill.safetensors"
            fit(student, task, self.training(), checkpoint, lesson, setting.original)
        return student
