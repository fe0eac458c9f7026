"""Distillation: train a student to give what its teacher gives, inside too."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from paredown.core.errors import UserError
from paredown.core.files import sha256
from paredown.core.settings import check_arguments
from paredown.core.task import Task
from paredown.data import feed, splits
from paredown.graph import store
from paredown.graph.model import Model, made_from
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.train.distill.lesson import Teaching, prepare
from paredown.train.distill.student import captured, check_fits, check_name, found
from paredown.train.distill.teacher import keep, room
from paredown.train.distill.zoo_students import Scale, is_name, told
from paredown.train.loop import fit
from paredown.train.settings import Training


@dataclass(frozen=True)
class Distill(Step):
    """Train a model on what the original says of the task's training data, labelled or not.

    The settings are those of `paredown.train.distill.lesson.Teaching` (what is taught) and
    `paredown.train.settings.Training` (how), and these:

    Args:
        student: the model that takes the original's place, and learns from it: a net of the zoo
            ("zoo:mobilenet_v2"), made for the original's inputs and outputs; a Python file that
            defines ``model()``, a saved model (.safetensors, .pt2), or from Python an
            ``nn.Module``. It takes the original's inputs and gives outputs of the same shapes. A
            .py or .pt2 file is code: name only those that you trust. None trains the model as the
            steps before have left it.
        width, depth, resolution: of a net of the zoo, what its channels, its blocks, and the rows
            and columns of its images are multiplied by.
        cache: ask the teacher once about each example and keep what it says on disk, for data
            that are the same in every epoch.

    It pays where few examples are labelled: on the digits, with 100 labels, a student of a tenth
    of the parameters came from 89.2 to 97.2 %, and to 98.3 % with
    ``internal=("attention_transfer",)`` (docs/distillation.md). It does not pay with too few
    steps: with half of them it was worse than training alone. Each step costs the teacher's
    forward pass besides.

    Pruned weights stay zero, and the quantizers of a quantized model train as with `FineTune`.

    Raises:
        UserError: a setting is out of its range, the student's inputs or outputs are others than
            the original's, a layer does not exist, or ``cache`` is set and the data vary.

    Example:
        >>> import paredown
        >>> Distill(alpha=0).needs == {"train"}, sorted(Distill().needs)
        (True, ['loss', 'train'])
        >>> Distill(student="gone.py").problems()[0].partition(" in ")[0]
        'student: gone.py: no such file'
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
            does="trains the compressed model on what the original says of the training data, "
            "labelled or not; inner values too",
            pays="few labels, and more data than labels: 8 points on digits",
            does_not="few steps: the student learns more slowly at first, and each step costs the "
            "teacher's forward pass",
        ),
        Entry(
            call='Distill(student="zoo:mobilenet_v2", width=0.35)',
            does="puts a MobileNet, EfficientNet, small transformer or other net of the zoo in the "
            "original's place, taught by it",
            pays="where goals are far below what the original can be pared down to",
            does_not="where training data are few, or the rest reaches the goals: it starts from "
            "random weights",
        ),
        Entry(
            call='Distill(student="small.py")',
            does="puts a small architecture of your own in the original's place, taught by it",
            pays="where a tenth of the model can do it: the digits in a tenth of the bytes, half a "
            "point lower",
            does_not="where the student is too small, or trained for too few epochs",
        ),
    )

    student: str | nn.Module | Model | None = None
    width: float = Scale.width
    depth: float = Scale.depth
    resolution: float = Scale.resolution
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
        if isinstance(self.student, Path):
            object.__setattr__(self, "student", str(self.student))
        self.scale()
        kinds = str | nn.Module | Model | None
        check_arguments(student=(self.student, kinds), cache=(self.cache, bool))
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

    @property
    def role(self) -> str:
        return "recovers" if self.student is None else "replaces"

    def problems(self) -> list[str]:
        """What would stop it later, seen before any work."""
        if self.student is None:
            scaled = self.scale() != Scale()
            return ["width, depth and resolution are those of a student of the zoo."] * scaled
        return list(filter(None, [check_name(self.student, self.scale())]))

    def scale(self) -> Scale:
        return Scale(self.width, self.depth, self.resolution)

    def unfit(self, model: Model, task: Task) -> list[str]:
        """Why the student cannot take the model's place."""
        try:
            self._placed(model, task)
        except UserError as error:
            return [str(error)]
        return []

    def contents(self, task: Task) -> dict[str, str]:
        """What the student is: its graph and weights, whichever files they come from; of a net of
        the zoo, its name and scale."""
        if self.student is None:
            return {}
        if isinstance(self.student, str) and is_name(self.student):
            text = told(self.student, self.scale())
            return {self.student: sha256(text.encode())}
        return {str(self.student): store.digest(captured(self.student, task))}

    def _placed(self, model: Model, task: Task) -> Model:
        """The model that is trained."""
        if self.student is None:
            return model.copy()
        student = found(self.student, task, model, self.scale(), self.seed)
        check_fits(student, model)
        return student

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        lacking = task.missing(self.needs)
        if lacking:
            raise UserError(f"Distill: needs {' and '.join(lacking)} of the task.")
        student, teacher = self._placed(model, task), (setting.original or model).copy().eval()
        related = self.student is None and made_from(student, teacher)
        lesson = prepare(teacher, student, task, self.teaching(), related)
        folder = setting.scratch
        with room(folder) as place:
            if self.cache:
                data, size = splits.split(task, "train"), feed.size(student, task.batch_size)
                given = feed.every(student, data, size)
                task = replace(task, train=keep(given, lesson.says, place))
            checkpoint = folder and folder / "distill.safetensors"
            zeros = student if self.student is not None else setting.original
            fit(student, task, self.training(), checkpoint, lesson, zeros)
        return student
