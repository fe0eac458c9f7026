"""The one training loop: seeded, resumable, and true to what is pruned and what is shared."""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from paredown import batches, data, machine, progress, qat
from paredown.checkpoint import State, copy_into, mark_of, resume, tensors, trainable, write
from paredown.graph.model import Model
from paredown.lasso import Lasso, units_of
from paredown.ties import Ties
from paredown.types import Task, UserError

scratch: ContextVar[Path | None] = ContextVar("scratch", default=None)  # folder for checkpoints


@dataclass(frozen=True)
class Training:
    """How to train.

    ``lr`` rises linearly over the ``warmup`` share of all steps, then falls as a half cosine
    (SGDR, arXiv 1608.03983). Weight decay spares tensors of one dimension (biases, norms).

    Args:
        epochs: passes over the training data; 0.25 is a quarter of one pass.
        optimizer: "adamw" (decoupled decay, arXiv 1711.05101) or "sgd" with ``momentum``.
        clip_norm: upper bound of the gradient's norm, or None.
        batch_size: examples per optimiser step; None takes the task's.
        group_lasso: strength of a group lasso over the units that `PruneChannels` can cut, so that
            it later finds units at nothing (`paredown.lasso`); 0 is off. Each step takes ``lr *
            group_lasso`` of its group's mean norm from the strongest unit, 16 times that from the
            weakest, for each group that a weight belongs to.
        quantizers: what the scales of a quantized model do: "learned" trains them with the weights
            (LSQ, arXiv 1902.08153), "average" lets them follow the moving average of the ranges
            (arXiv 1712.05877), "frozen" leaves them. No effect on a model in float.
        patience: stop after so many epochs without a better validation score and restore the
            best weights; None trains to the end and keeps the last.
        seed: decides shuffling, dropout and augmentation; same seed and machine, same weights.
        device: "cpu", "cuda", or "auto" for the GPU where there is one.

    Raises:
        UserError: a setting is out of its range.
    """

    epochs: float = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float | None = 1.0
    batch_size: int | None = None
    group_lasso: float = 0.0
    quantizers: str = "learned"
    patience: int | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, 0 < self.epochs < math.inf, "a number above 0")
        _require("optimizer", self.optimizer, self.optimizer in _OPTIMIZERS, '"adamw" or "sgd"')
        _require("lr", self.lr, 0 < self.lr < math.inf, "a number above 0, such as 5e-4")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 up, below 1")
        decay = self.weight_decay
        _require("weight_decay", decay, 0 <= decay < math.inf, "a number from 0 up")
        _require("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps, below 1")
        norm, size = self.clip_norm, self.batch_size
        _require("clip_norm", norm, norm is None or norm > 0, "a number above 0, or None")
        _require("batch_size", size, size is None or size >= 1, "a whole number from 1 up")
        lasso = self.group_lasso
        _require("group_lasso", lasso, 0 <= lasso < math.inf, "a strength from 0 up; 0 is off")
        kinds = ", ".join(f'"{kind}"' for kind in qat.KINDS)
        _require("quantizers", self.quantizers, self.quantizers in qat.KINDS, f"one of {kinds}")
        stop = self.patience
        _require("patience", stop, stop is None or stop >= 1, "a whole number of epochs from 1 up")
        devices = ("cpu", "cuda", "auto")
        _require("device", self.device, self.device in devices, '"cpu", "cuda" or "auto"')


_OPTIMIZERS = ("adamw", "sgd")


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name}: expected {expected}, got {value!r}.")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step 0 ... steps - 1: a linear rise, then a half cosine (arXiv 1608.03983).

    Example:
        >>> [round(learning_rate(step, 6, 1.0, 0.3), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


class Objective(Protocol):
    """What training minimises, and what it trains beside the model and forgets afterwards."""

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        """Trained with the model's parameters and kept in the checkpoint."""

    def mark(self) -> str:
        """What a checkpoint must agree with."""

    def to(self, device: torch.device) -> None:
        """Move what the loss needs, in place."""

    def __call__(self, model: Model, inputs: Any, target: Any) -> Tensor:
        """The mean loss of a batch, ()."""


@dataclass(frozen=True)
class _TaskLoss:
    """The task's own loss of the outputs."""

    task: Task

    @property
    def extra(self) -> dict[str, nn.Parameter]:
        return {}

    def mark(self) -> str:
        return ""

    def to(self, device: torch.device) -> None:
        pass

    def __call__(self, model: Model, inputs: Any, target: Any) -> Tensor:
        return task_loss(self.task, batches.call(model, inputs), target)


def task_loss(task: Task, output: Any, target: Any) -> Tensor:
    """The task's loss of a batch.

    Raises:
        UserError: it is not one number, or no gradient reaches the model through it.
    """
    assert task.loss is not None
    loss = task.loss(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"task.loss: expected one number, a tensor of shape (), got {got}.")
    if not loss.requires_grad:
        raise UserError(
            "task.loss: does not depend on the model's weights; check it for "
            "detach(), argmax() or no_grad()."
        )
    return loss


def fit(
    model: Model,
    task: Task,
    settings: Training,
    checkpoint: Path | None = None,
    objective: Objective | None = None,
) -> list[dict[str, Any]]:
    """Train the model's graph in place; it ends in evaluation mode, on the device it came from.

    Args:
        checkpoint: a file written after each epoch. Where it holds this same training (model,
            settings and data sizes), it goes on from there, to the same bits; else it is replaced.
        objective: what is minimised; None is the task's own loss.

    Returns:
        One row for each epoch: ``epoch``, ``loss`` (mean), ``lr`` and, with a validation split,
        ``score`` (mean).

    Raises:
        UserError: no training data or loss, nothing to train (or, with ``group_lasso``, to
            shrink), a loss that is not finite, a group that the lasso has driven to zero, or not
            enough memory for one example.
    """
    _check(model, task, settings, objective)
    objective = objective or _TaskLoss(task)
    home, device = machine.device_of(model), machine.device(settings.device)
    mark = mark_of(model, task, settings, objective.mark()) if checkpoint else ""
    lasso = units_of(model, settings.group_lasso) if settings.group_lasso else None
    try:
        qat.attach(model, settings.quantizers)
        machine.move(model, device)
        objective.to(device)
        lasso = lasso and lasso.to(device)
        with machine.repeatable(device):
            state = _start(model, task, settings, objective.extra)
            if checkpoint is not None:
                resume(checkpoint, mark, model, state)
            while state.epoch < math.ceil(settings.epochs) and not _stopped(state, settings):
                _one_epoch(model, task, settings, state, objective, lasso)
                if checkpoint is not None:
                    write(checkpoint, mark, model, state)
        if settings.patience is not None:
            copy_into(tensors(model.graph), state.best)
    finally:
        model.eval()
        qat.bake(model)
        machine.move(model, home)
    return state.history


def evaluate(model: Model, split: Dataset[Any], task: Task) -> Tensor:
    """The score of each example of a split, (N,) float32 on the CPU; evaluation mode.

    Raises:
        UserError: ``task.score`` does not give one finite number for each example.
    """
    model.eval()
    device, fixed = machine.device_of(model), model.fixed_batch
    scores = []
    with torch.no_grad():
        for batch in data.batches(split, fixed or task.batch_size):
            count = batches.count(batch)
            full = batches.padded(batch, fixed) if fixed else batch
            scores.append(_scores(model, task, batches.to(full, device))[:count])
    return torch.cat(scores)


def _scores(model: Model, task: Task, batch: Any) -> Tensor:
    count = batches.count(batch)
    output = None
    try:
        output = batches.call(model, batch[0])
    except Exception as error:
        if not machine.no_memory(error) or count == 1 or model.fixed_batch:
            raise
    if output is None:  # the handler has let go of the failed pass, and of its memory
        progress.say(f"out of memory at a batch of {count}: evaluating it in two halves")
        halves = batches.chunks(batch, -(-count // 2))
        return torch.cat([_scores(model, task, half) for half in halves])
    score = task.score(output, batch[1])
    if not isinstance(score, Tensor) or score.shape != (count,):
        got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise UserError(
            f"task.score: expected one number for each example, shape ({count},), got {got}; "
            "do not average over the batch."
        )
    found = score.detach().float().cpu()
    if not torch.isfinite(found).all():
        bad = int((~torch.isfinite(found)).sum())
        raise UserError(
            f"task.score: {bad} of {count} scores of a batch are NaN or infinite; check the "
            "model's output and divisions by zero in the score."
        )
    return found


# --- one epoch, one step ---------------------------------------------------------------------


def _one_epoch(
    model: Model,
    task: Task,
    settings: Training,
    state: State,
    objective: Objective,
    lasso: Lasso | None,
) -> None:
    """Epoch ``state.epoch``: every step, the validation score, the row of the history."""
    split = data.split(task, "train")
    per_epoch = batches.per_epoch(data.size(split), state.batch, model.fixed_batch)
    total = max(1, round(settings.epochs * per_epoch))
    first = state.epoch * per_epoch
    seed = settings.seed * 1_000_003 + state.epoch  # so a resumed epoch draws the same numbers
    machine.seed(seed)
    model.train()
    masks, ties = _Masks(model), Ties(model)
    weights = _weights(model)
    losses, rate = [], 0.0
    order = data.batches(split, state.batch, shuffle=True, seed=seed)
    steps = min(per_epoch, total - first)
    what = f"training, epoch {state.epoch + 1}"
    for index, batch in enumerate(progress.track(batches.first(order, steps), what, steps)):
        rate = learning_rate(first + index, total, settings.lr, settings.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        losses.append(_loss_and_gradients(model, objective, batch, state))
        _check_loss(losses[-1], state.epoch, index, rate)
        _update(weights, settings, state, masks, ties)
        if lasso is not None:
            lasso.shrink(rate)
            ties.hold()
    _check_weights(model, state.epoch)
    model.eval()
    qat.hold(model)
    row = {"epoch": state.epoch + 1, "loss": math.fsum(losses) / len(losses), "lr": rate}
    if task.validation is not None:
        row["score"] = float(evaluate(model, task.validation, task).double().mean())
        _remember(model, state, row["score"], settings)
    state.history.append(row)
    state.epoch += 1
    score = f", validation score {row['score']:.4g}" if "score" in row else ""
    gone = f", {lasso.zeros()} of {len(lasso.group)} units at zero" if lasso is not None else ""
    progress.say(f"  epoch {state.epoch}: loss {row['loss']:.4g}{score}{gone}")


def _loss_and_gradients(model: Model, objective: Objective, batch: Any, state: State) -> float:
    """Of one batch; where memory is short, in chunks whose gradients add up to it."""
    device = machine.device_of(model)
    while True:
        state.optimizer.zero_grad()
        try:
            return _gradients(model, objective, batch, state.chunk, device)
        except Exception as error:
            if not machine.no_memory(error):
                raise
        _halve(model, state, batches.count(batch))


def _weights(model: Model) -> list[nn.Parameter]:
    """What is trained, but for the changes of scales, whose gradients have a bound of their own."""
    changes = qat.changes(model)
    return [p for p in trainable(model).values() if id(p) not in changes]


def _update(
    weights: list[nn.Parameter], settings: Training, state: State, masks: _Masks, ties: Ties
) -> None:
    masks.hold_gradients()
    gradients = ties.gradients(weights)
    if settings.clip_norm is not None:
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(weights, settings.clip_norm, norm)
    state.optimizer.step()
    masks.hold_weights()
    ties.hold()


def _gradients(
    model: Model, objective: Objective, batch: Any, chunk: int, device: torch.device
) -> float:
    count, total = batches.count(batch), 0.0
    for part in batches.chunks(batch, chunk):
        loss = objective(model, *batches.to(part, device))
        share = batches.count(part) / count
        (loss * share if share < 1 else loss).sum().backward()
        total += float(loss.detach()) * share
    return total


def _halve(model: Model, state: State, count: int) -> None:
    """After the handler has let go of the failed pass, so that its memory is free again."""
    machine.free_memory()
    size = min(state.chunk, count)
    if size == 1 or model.fixed_batch:
        raise UserError(
            f"training: out of memory at a batch of {size}, which cannot be split; use smaller "
            "inputs, a device with more memory, or optimizer='sgd', which keeps fewer numbers."
        )
    state.chunk = -(-size // 2)
    progress.say(
        f"out of memory at a batch of {size}: going on with {state.chunk} at a time, gradients "
        f"added up to the same batch of {state.batch}"
    )


def _check_loss(loss: float, epoch: int, index: int, rate: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"training: the loss is {loss} at epoch {epoch + 1}, batch {index + 1} "
            f"(lr {rate:.3g}); use a smaller lr, set clip_norm, and check the data for NaN."
        )


def _check_weights(model: Model, epoch: int) -> None:
    for name, parameter in trainable(model).items():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"training: {name} became NaN or infinite in epoch {epoch + 1}; use a smaller "
                "lr and set clip_norm."
            )


class _Masks:
    """What keeps pruned weights at zero: no gradient bends their momentum, no step revives them."""

    def __init__(self, model: Model) -> None:
        named = dict(model.graph.named_parameters(remove_duplicate=False))
        both: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for name, mask in model.masks.items():
            parameter = named.get(name)
            if parameter is not None and parameter.requires_grad:
                kept = mask.to(parameter.device, parameter.dtype)
                earlier = both.get(id(parameter))
                both[id(parameter)] = (parameter, kept if earlier is None else kept * earlier[1])
        self.parameters: list[Tensor] = [parameter for parameter, _ in both.values()]
        self.masks = [mask for _, mask in both.values()]

    def hold_gradients(self) -> None:
        pairs = zip(self.parameters, self.masks, strict=True)
        held = [(p.grad, mask) for p, mask in pairs if p.grad is not None]
        if held:
            torch._foreach_mul_([grad for grad, _ in held], [mask for _, mask in held])

    def hold_weights(self) -> None:
        if self.masks:
            with torch.no_grad():
                torch._foreach_mul_(self.parameters, self.masks)


def _remember(model: Model, state: State, score: float, settings: Training) -> None:
    scores = [row["score"] for row in state.history]
    if settings.patience is not None and (not scores or score > max(scores)):
        state.best = {name: t.detach().clone() for name, t in tensors(model.graph).items()}
        state.best_epoch = state.epoch


def _stopped(state: State, settings: Training) -> bool:
    """Whether the score has not risen for ``patience`` epochs."""
    if settings.patience is None or not state.history:
        return False
    return state.epoch - 1 - state.best_epoch >= settings.patience


# --- the start -------------------------------------------------------------------------------


def _check(model: Model, task: Task, settings: Training, objective: Objective | None) -> None:
    data.split(task, "train")
    if task.loss is None and objective is None:
        raise UserError("task: has no loss, which training needs: loss(output, target) -> ().")
    if settings.patience is not None and task.validation is None:
        raise UserError("patience: stopping early needs a validation split, which the task lacks.")
    learning = trainable(model)
    if not learning:
        raise UserError(
            "model: has nothing to train: no floating-point parameter with requires_grad."
        )
    half = [name for name, parameter in learning.items() if parameter.dtype == torch.float16]
    if half:
        raise UserError(
            f"model: {half[0]} is float16, in which training does not converge; "
            'train before Cast("fp16").'
        )


def _start(model: Model, task: Task, settings: Training, extra: dict[str, nn.Parameter]) -> State:
    parameters = [*trainable(model).values(), *extra.values()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, settings.lr, settings.momentum, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, settings.lr, fused=True)
    batch = model.fixed_batch or settings.batch_size or task.batch_size
    count = data.size(data.split(task, "train"))
    if model.fixed_batch and count < batch:
        raise UserError(
            f"model: was captured with a fixed batch of {batch}; the train split has only {count} "
            "examples."
        )
    return State(optimizer, batch, batch, extra)
