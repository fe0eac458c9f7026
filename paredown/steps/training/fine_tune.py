"""Fine-tuning: train on with the task's own loss, to win back what a cut has cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from paredown.core.task import Task
from paredown.graph.model import Model
from paredown.steps.step import ALONE, Entry, Setting, Step
from paredown.train.loop import fit
from paredown.train.settings import Training


@dataclass(frozen=True)
class FineTune(Step):
    """Train the model on the task's training data; pruned weights stay zero.

    It pays after every step that loses accuracy, and between the steps of a gradual schedule.
    The settings are those of `paredown.train.settings.Training`.

    ``group_lasso`` pays where training is long enough (ten epochs and more) for whole channels to
    reach zero while the score holds: a `PruneChannels` then takes them for nothing. Cut short, or
    too strong, it costs score; and where the cut is followed by ``reconstruct``, a moderate cut
    does as well without it.

    Raises:
        UserError: a setting is out of its range, or the model has nothing to train.

    Example:
        >>> import paredown
        >>> schedule = 3 * [paredown.PruneWeights(0.2), paredown.FineTune(epochs=1, lr=1e-3)]
        >>> len(schedule)
        6
    """

    needs: ClassVar[frozenset[str]] = frozenset({"train", "loss"})
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="FineTune(epochs=1)",
            does="trains the compressed graph; pruned weights stay zero; `group_lasso=` drives "
            "whole units to zero",
            pays="after every step that loses accuracy",
        ),
    )

    # the names again, so that a recipe stays flat; defaults and checks are Training's
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
        self.training()

    @property
    def role(self) -> str:
        return "recovers"

    def training(self) -> Training:
        return Training(**asdict(self))

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        trained = model.copy()
        checkpoint = setting.scratch and setting.scratch / "fine_tune.safetensors"
        fit(trained, task, self.training(), checkpoint, original=setting.original)
        return trained
