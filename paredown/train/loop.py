"""The one training loop: seeded, resumable, and true to what is pruned and what is shared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.task import Task
from paredown.data import batches, feed, splits
from paredown.data.evaluate import evaluate
from paredown.graph import lazily, machine
from paredown.graph.holds import own_zeros
from paredown.graph.holds.every import HOLDS
from paredown.graph.holds.hold import Keeper
from paredown.graph.model import Model
from paredown.train import parts, qat
from paredown.train.checkpoint import State, mark_of, resume, write
from paredown.train.lasso import Lasso, units_of
from paredown.train.objective import Objective, TaskLoss
from paredown.train.parameters import copy_into, tensors, trainable
from paredown.train.settings import Training, learning_rate


def fit(
    model: Model,
    task: Task,
    settings: Training,
    checkpoint: Path | None = None,
    objective: Objective | None = None,
    original: Model | None = None,
) -> list[dict[str, Any]]:
    """Train the model's graph in place; it ends in evaluation mode, on the device it came from.

    Args:
        checkpoint: a file written after each epoch. Where it holds this same training (model,
            settings and data sizes), it goes on from there, to the same bits; else it is replaced.
        objective: what is minimised; None is the task's own loss.
        original: the model whose zeros are to stay where it is sparse; None is this one.

    Returns:
        One row for each epoch: ``epoch``, ``loss`` (mean), ``lr`` and, with a validation split,
        ``score`` (mean).

    Raises:
        UserError: no training data or loss, nothing to train (or, with ``group_lasso``, to
            shrink), a loss that is not finite, a group that the lasso has driven to zero, or not
            enough memory for one example.
    """
    _check(model, task, settings, objective)
    objective = objective or TaskLoss(task)
    _settle_zeros(model, settings, original or model)
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
            if settings.patience is not None and state.epoch == 0:
                state.start = _mean_score(model, task)
                state.best = _copied(model)
            per_epoch, total = _steps(model, task, settings, state)
            while state.epoch * per_epoch < total and not _stopped(state, settings):
                _one_epoch(model, task, settings, state, objective, lasso)
                if checkpoint is not None:
                    write(checkpoint, mark, model, state)
        if settings.patience is not None:
            copy_into(tensors(model.graph), state.best)
            if state.best_epoch < 0:
                progress.say("  no epoch scored better than the model as it came, which is kept")
    finally:
        model.eval()
        qat.bake(model)
        machine.move(model, home)
    return state.history


def _settle_zeros(model: Model, settings: Training, original: Model) -> None:
    """Which weights are held at zero, and what is said of it."""
    if settings.zeros == own_zeros.FREE:
        own_zeros.free(model)
        return
    told = own_zeros.adopt(model, original)
    if told:
        progress.say(f"  note: {told}")


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
    split = splits.split(task, "train")
    per_epoch, total = _steps(model, task, settings, state)
    first = state.epoch * per_epoch
    seed = settings.seed * 1_000_003 + state.epoch  # so a resumed epoch draws the same numbers
    machine.seed(seed)
    model.train()
    keepers = [hold.keeper(model) for hold in HOLDS]
    weights = _weights(model)
    losses, rate = [], 0.0
    steps = min(per_epoch, total - first)
    given = splits.batches(split, state.batch, shuffle=True, seed=seed, most=steps)
    what = f"training, epoch {state.epoch + 1}"
    for index, batch in enumerate(progress.track(given, what, steps)):
        rate = learning_rate(first + index, total, settings.lr, settings.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        losses.append(_loss_and_gradients(model, objective, batch, state))
        _check_loss(losses[-1], state.epoch, index, rate)
        _update(weights, settings, state, keepers)
        if lasso is not None:
            lasso.shrink(rate)
            for keeper in keepers:
                keeper.hold()
    _check_weights(model, state.epoch)
    model.eval()
    qat.hold(model)
    row = {"epoch": state.epoch + 1, "loss": math.fsum(losses) / len(losses), "lr": rate}
    if task.validation is not None:
        row["score"] = _mean_score(model, task)
        _remember(model, state, row["score"], settings)
    state.history.append(row)
    state.epoch += 1
    score = f", validation score {row['score']:.4g}" if "score" in row else ""
    gone = f", {lasso.zeros()} of {len(lasso.group)} units at zero" if lasso is not None else ""
    progress.say(f"  epoch {state.epoch}: loss {row['loss']:.4g}{score}{gone}")


def _steps(model: Model, task: Task, settings: Training, state: State) -> tuple[int, int]:
    """Of a whole epoch, and of the training: the nearest whole number, at least one."""
    examples = splits.size(splits.split(task, "train"))
    per_epoch = batches.per_epoch(examples, state.batch, model.fixed_batch)
    return per_epoch, max(1, round(settings.epochs * per_epoch))


def _loss_and_gradients(model: Model, objective: Objective, batch: Any, state: State) -> float:
    """Of one batch; where memory is short, in parts."""
    device = machine.device_of(model)
    before = [buffer.clone() for buffer in model.graph.buffers()]
    while True:
        state.optimizer.zero_grad()
        try:
            return parts.gradients(model, objective, batch, state.chunk, device)
        except Exception as error:
            if not machine.no_memory(error):
                raise
        parts.put_back(model, before)
        _halve(model, state, objective, batch)


def _weights(model: Model) -> list[nn.Parameter]:
    """What is trained, but for the changes of scales, whose gradients have a bound of their own."""
    changes = qat.changes(model)
    return [p for p in trainable(model).values() if id(p) not in changes]


def _update(
    weights: list[nn.Parameter], settings: Training, state: State, keepers: list[Keeper]
) -> None:
    free, gradients = weights, []
    for keeper in keepers:
        free, instead = keeper.gradients(free)
        gradients += instead
    gradients = [p.grad for p in free if p.grad is not None] + gradients
    if settings.clip_norm is not None:
        norm = nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(weights, settings.clip_norm, norm)
    state.optimizer.step()
    for keeper in keepers:
        keeper.hold()


def _halve(model: Model, state: State, objective: Objective, batch: Any) -> None:
    """After the handler has let go of the failed pass, so that its memory is free again."""
    machine.free_memory()
    size = min(state.chunk, batches.count(batch))
    if size == 1 or model.fixed_batch:
        raise UserError(
            f"training: out of memory at a batch of {size}, which cannot be split; use smaller "
            "inputs, a device with more memory, or optimizer='sgd', which keeps fewer numbers."
        )
    state.chunk = -(-size // 2)
    differ = parts.differences(model, objective, batch, state.chunk)
    but = f"; but {' and '.join(differ)}, so the result differs from that of whole batches"
    progress.say(
        f"out of memory at a batch of {size}: going on with {state.chunk} at a time in two passes, "
        f"gradients being those of the loss of the same batch of {state.batch}{but * bool(differ)}"
    )


def _check_loss(loss: float, epoch: int, index: int, rate: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"training: the loss is {loss} at epoch {epoch + 1}, batch {index + 1} "
            f"(lr {rate:.3g}); use a smaller lr, set clip_norm, and check the data for NaN."
        )


def _check_weights(model: Model, epoch: int) -> None:
    for name, parameter in trainable(model).items():
        if not lazily.finite(parameter):
            raise UserError(
                f"training: {name} became NaN or infinite in epoch {epoch + 1}; use a smaller "
                "lr and set clip_norm."
            )


def _remember(model: Model, state: State, score: float, settings: Training) -> None:
    if settings.patience is None or state.start is None:
        return
    if score > max([state.start, *(row["score"] for row in state.history)]):
        state.best, state.best_epoch = _copied(model), state.epoch


def _mean_score(model: Model, task: Task) -> float:
    assert task.validation is not None
    return float(evaluate(model, task.validation, task).double().mean())


def _copied(model: Model) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors(model.graph).items()}


def _stopped(state: State, settings: Training) -> bool:
    """Whether the score has not risen for ``patience`` epochs."""
    if settings.patience is None or not state.history:
        return False
    return state.epoch - 1 - state.best_epoch >= settings.patience


# --- the start -------------------------------------------------------------------------------


def _check(model: Model, task: Task, settings: Training, objective: Objective | None) -> None:
    splits.split(task, "train")
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
    feed.check_fills(model, splits.split(task, "train"), "train")
    batch = feed.size(model, settings.batch_size or task.batch_size)
    return State(optimizer, batch, batch, extra)
