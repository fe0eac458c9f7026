"""What training minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches
from paredown.data.evaluate import failed
from paredown.graph import machine, structure
from paredown.graph.model import Model


class Objective(Protocol):
    """What training minimises, and what it trains beside the model and forgets afterwards."""

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        """Trained with the model's parameters and kept in the checkpoint."""

    def mark(self) -> str:
        """What a checkpoint must agree with."""

    def to(self, device: torch.device) -> None:
        """Move what the loss needs, in place."""

    def values(self, model: Model, inputs: Any, target: Any) -> list[Tensor]:
        """What the loss of a batch is made of besides its target, batch first."""

    def loss(self, model: Model, values: list[Tensor], target: Any) -> Tensor:
        """The loss of a batch, (), from its `values`."""

    def __call__(self, model: Model, inputs: Any, target: Any) -> Tensor:
        """The loss of a batch, ()."""


@dataclass(frozen=True)
class TaskLoss:
    """The task's own loss of the outputs."""

    task: Task

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        return {}

    def mark(self) -> str:
        return ""

    def to(self, device: torch.device) -> None:
        pass

    def values(self, model: Model, inputs: Any, target: Any) -> list[Tensor]:
        return structure.flatten(batches.call(model, inputs))[0]

    def loss(self, model: Model, values: list[Tensor], target: Any) -> Tensor:
        return task_loss(self.task, structure.unflatten(values, model.outputs), target)

    def __call__(self, model: Model, inputs: Any, target: Any) -> Tensor:
        return task_loss(self.task, batches.call(model, inputs), target)


def task_loss(task: Task, output: Any, target: Any) -> Tensor:
    """The task's loss of a batch.

    Raises:
        UserError: it fails, is not one number, or no gradient reaches the model through it.
    """
    assert task.loss is not None
    try:
        loss = task.loss(output, target)
    except Exception as error:
        if machine.no_memory(error):
            raise
        raise UserError(failed("task.loss", error, output, target)) from error
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"task.loss: expected one number, a tensor of shape (), got {got}.")
    if not loss.requires_grad:
        raise UserError(
            "task.loss: does not depend on the model's weights; check it for "
            "detach(), argmax() or no_grad()."
        )
    return loss
