"""Fine-tuning: train on with the task's own loss, to win back what a cut has cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from paredown.graph.model import Model
from paredown.train import Training, fit, scratch
from paredown.types import Task


@dataclass(frozen=True)
class FineTune:
    """Train the model on the task's training data; pruned weights stay zero.

    It pays after every step that loses accuracy, and between the steps of a gradual schedule.
    The settings are those of `paredown.train.Training`.

    Raises:
        UserError: a setting is out of its range, or the model has nothing to train.

    Example:
        >>> import paredown
        >>> schedule = 3 * [paredown.PruneWeights(0.2), paredown.FineTune(epochs=1, lr=1e-3)]
        >>> len(schedule)
        6
    """

    needs: ClassVar[frozenset[str]] = frozenset({"train", "loss"})

    epochs: float = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float | None = 1.0
    batch_size: int | None = None
    patience: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        self.training()

    def training(self) -> Training:
        return Training(**asdict(self))

    def apply(self, model: Model, task: Task) -> Model:
        trained = model.copy()
        folder = scratch.get()
        fit(trained, task, self.training(), folder and folder / "fine_tune.safetensors")
        return trained
