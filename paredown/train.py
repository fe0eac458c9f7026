"""The one training loop: seeded, resumable, and true to the masks of a pruned model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.utils.data import Dataset

from paredown import data, progress
from paredown.files import write_atomically
from paredown.graph import structure
from paredown.graph.model import Model
from paredown.types import Task, UserError

scratch: ContextVar[Path | None] = ContextVar("scratch", default=None)  # folder for checkpoints

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


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


@dataclass
class _State:
    """Where a training stands; `_write` and `_resume` keep all of it."""

    optimizer: torch.optim.Optimizer
    batch: int  # examples per optimiser step
    chunk: int  # examples that fit into memory at once
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1


def fit(
    model: Model, task: Task, settings: Training, checkpoint: Path | None = None
) -> list[dict[str, Any]]:
    """Train the model's graph in place; it ends in evaluation mode, on the device it came from.

    Args:
        checkpoint: a file written after each epoch. Where it holds this same training (model,
            settings and data sizes), it goes on from there, to the same bits; else it is replaced.

    Returns:
        One row for each epoch: ``epoch``, ``loss`` (mean), ``lr`` and, with a validation split,
        ``score`` (mean).

    Raises:
        UserError: no training data or loss, nothing to train, a loss that is not finite, or not
            enough memory for one example.
    """
    _check(model, task, settings)
    home, device = _device_of(model), _device(settings.device)
    mark = _mark(model, task, settings) if checkpoint else ""
    try:
        _move(model, device)
        with _deterministic(device):
            state = _start(model, task, settings)
            if checkpoint is not None:
                _resume(checkpoint, mark, model, state)
            while state.epoch < math.ceil(settings.epochs) and not _stopped(state, settings):
                _one_epoch(model, task, settings, state)
                if checkpoint is not None:
                    _write(checkpoint, mark, model, state)
        if settings.patience is not None:
            _copy_into(_tensors(model.graph), state.best)
    finally:
        model.eval()
        _move(model, home)
    return state.history


def evaluate(model: Model, split: Dataset[Any], task: Task) -> Tensor:
    """The score of each example of a split, (N,) float32 on the CPU; evaluation mode.

    Raises:
        UserError: ``task.score`` does not give one finite number for each example.
    """
    model.eval()
    device, fixed = _device_of(model), model.fixed_batch
    scores = []
    with torch.no_grad():
        for batch in data.batches(split, fixed or task.batch_size):
            count = _count(batch)
            full = _padded(batch, fixed) if fixed else batch
            scores.append(_scores(model, task, _to(full, device))[:count])
    return torch.cat(scores)


def _scores(model: Model, task: Task, batch: Any) -> Tensor:
    count = _count(batch)
    output = None
    try:
        output = _call(model, batch[0])
    except Exception as error:
        if not _no_memory(error) or count == 1 or model.fixed_batch:
            raise
    if output is None:  # the handler has let go of the failed pass, and of its memory
        progress.say(f"out of memory at a batch of {count}: evaluating it in two halves")
        return torch.cat([_scores(model, task, half) for half in _chunks(batch, -(-count // 2))])
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


def _one_epoch(model: Model, task: Task, settings: Training, state: _State) -> None:
    """Epoch ``state.epoch``: every step, the validation score, the row of the history."""
    split = data.split(task, "train")
    per_epoch = _steps_per_epoch(data.size(split), state.batch, model.fixed_batch)
    total = max(1, round(settings.epochs * per_epoch))
    first = state.epoch * per_epoch
    seed = settings.seed * 1_000_003 + state.epoch  # so a resumed epoch draws the same numbers
    _seed(seed)
    model.train()
    masks = _Masks(model)
    losses, rate = [], 0.0
    order = data.batches(split, state.batch, shuffle=True, seed=seed)
    steps = min(per_epoch, total - first)
    what = f"training, epoch {state.epoch + 1}"
    for index, batch in enumerate(progress.track(_first(order, steps), what, steps)):
        rate = learning_rate(first + index, total, settings.lr, settings.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        losses.append(_loss_and_gradients(model, task, batch, state))
        _check_loss(losses[-1], state.epoch, index, rate)
        _update(model, settings, state, masks)
    _check_weights(model, state.epoch)
    model.eval()
    row = {"epoch": state.epoch + 1, "loss": math.fsum(losses) / len(losses), "lr": rate}
    if task.validation is not None:
        row["score"] = float(evaluate(model, task.validation, task).double().mean())
        _remember(model, state, row["score"], settings)
    state.history.append(row)
    state.epoch += 1
    score = f", validation score {row['score']:.4g}" if "score" in row else ""
    progress.say(f"  epoch {state.epoch}: loss {row['loss']:.4g}{score}")


def _loss_and_gradients(model: Model, task: Task, batch: Any, state: _State) -> float:
    """Of one batch; where memory is short, in chunks whose gradients add up to it."""
    device = _device_of(model)
    while True:
        state.optimizer.zero_grad()
        try:
            return _gradients(model, task, batch, state.chunk, device)
        except Exception as error:
            if not _no_memory(error):
                raise
        _halve(model, state, _count(batch))


def _update(model: Model, settings: Training, state: _State, masks: _Masks) -> None:
    masks.hold_gradients()
    if settings.clip_norm is not None:
        grads = [p.grad for p in _trainable(model).values() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        nn.utils.clip_grads_with_norm_(_trainable(model).values(), settings.clip_norm, norm)
    state.optimizer.step()
    masks.hold_weights()


def _gradients(model: Model, task: Task, batch: Any, chunk: int, device: torch.device) -> float:
    assert task.loss is not None
    count, total = _count(batch), 0.0
    for part in _chunks(batch, chunk):
        inputs, target = _to(part, device)
        loss = task.loss(_call(model, inputs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UserError(f"task.loss: expected one number, a tensor of shape (), got {got}.")
        if not loss.requires_grad:
            raise UserError(
                "task.loss: does not depend on the model's weights; check it for "
                "detach(), argmax() or no_grad()."
            )
        share = _count(part) / count
        (loss * share if share < 1 else loss).sum().backward()
        total += float(loss.detach()) * share
    return total


def _halve(model: Model, state: _State, count: int) -> None:
    """After the handler has let go of the failed pass, so that its memory is free again."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
    for name, parameter in _trainable(model).items():
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


def _remember(model: Model, state: _State, score: float, settings: Training) -> None:
    scores = [row["score"] for row in state.history]
    if settings.patience is not None and (not scores or score > max(scores)):
        state.best = {name: t.detach().clone() for name, t in _tensors(model.graph).items()}
        state.best_epoch = state.epoch


def _stopped(state: _State, settings: Training) -> bool:
    """Whether the score has not risen for ``patience`` epochs."""
    if settings.patience is None or not state.history:
        return False
    return state.epoch - 1 - state.best_epoch >= settings.patience


# --- the start, and what may vary between machines -------------------------------------------


def _check(model: Model, task: Task, settings: Training) -> None:
    data.split(task, "train")
    if task.loss is None:
        raise UserError("task: has no loss, which training needs: loss(output, target) -> ().")
    if settings.patience is not None and task.validation is None:
        raise UserError("patience: stopping early needs a validation split, which the task lacks.")
    trainable = _trainable(model)
    if not trainable:
        raise UserError(
            "model: has nothing to train: no floating-point parameter with requires_grad."
        )
    half = [name for name, parameter in trainable.items() if parameter.dtype == torch.float16]
    if half:
        raise UserError(
            f"model: {half[0]} is float16, in which training does not converge; "
            'train before Cast("fp16").'
        )


def _start(model: Model, task: Task, settings: Training) -> _State:
    parameters = list(_trainable(model).values())
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
    return _State(optimizer, batch, batch)


def _steps_per_epoch(count: int, batch: int, fixed: int | None) -> int:
    """Batches of an epoch; a last one that is a single example has no variance to normalise by."""
    full, rest = divmod(count, batch)
    return full + (0 if fixed or (rest == 1 and full) else bool(rest))


def _first(batches: Iterator[Any], count: int) -> Iterator[Any]:
    for _, batch in zip(range(count), batches, strict=False):
        yield batch


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UserError('device: "cuda" was asked for, but torch sees no GPU; use "cpu" or "auto".')
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _device_of(model: Model) -> torch.device:
    return next((p.device for p in model.graph.parameters()), torch.device("cpu"))


def _move(model: Model, device: torch.device) -> None:
    if _device_of(model).type != device.type:
        model.to(device)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Reproducible kernels; the caller's random states and settings come back afterwards."""
    kept = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(kept, warn_only=warn)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            random.setstate(states[0])
            np.random.set_state(states[1])


def _no_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(t in str(error).lower() for t in _NO_MEMORY)
    )


# --- batches ---------------------------------------------------------------------------------


def _call(model: Model, inputs: Any) -> Any:
    args, kwargs = data.arguments(inputs)
    return model(*args, **kwargs)


def _count(batch: Any) -> int:
    return len(structure.flatten(batch)[0][0])


def _to(batch: Any, device: torch.device) -> Any:
    leaves, nesting = structure.flatten(batch)
    return structure.unflatten([leaf.to(device, non_blocking=True) for leaf in leaves], nesting)


def _chunks(batch: Any, size: int) -> list[Any]:
    """Parts of at most ``size`` examples, of sizes that differ by one at most."""
    parts = -(-_count(batch) // size)
    if parts == 1:
        return [batch]
    leaves, nesting = structure.flatten(batch)
    split = [leaf.tensor_split(parts) for leaf in leaves]
    return [structure.unflatten(list(row), nesting) for row in zip(*split, strict=True)]


def _padded(batch: Any, size: int) -> Any:
    """The batch with its last example repeated up to ``size``."""
    leaves, nesting = structure.flatten(batch)
    chosen = torch.arange(size).clamp(max=len(leaves[0]) - 1)
    return structure.unflatten([leaf[chosen] for leaf in leaves], nesting)


# --- the checkpoint --------------------------------------------------------------------------


def _trainable(model: Model) -> dict[str, nn.Parameter]:
    """Each trainable parameter once, tied ones under their first name."""
    named = model.graph.named_parameters()
    return {n: p for n, p in named if p.requires_grad and p.is_floating_point()}


def _tensors(graph: nn.Module) -> dict[str, Tensor]:
    """Each parameter and buffer once."""
    return {**dict(graph.named_parameters()), **dict(graph.named_buffers())}


def _copy_into(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)


def _mark(model: Model, task: Task, settings: Training) -> str:
    """What a checkpoint must agree with: the model before training, settings, sizes of the data."""
    sizes = [data.size(s) for s in (task.train, task.validation) if s is not None]
    digest = hashlib.sha256(json.dumps([asdict(settings), sizes, task.batch_size]).encode())
    digest.update(model.graph.code.encode())
    for name, tensor in sorted({**_tensors(model.graph), **_named("mask:", model.masks)}.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _write(path: Path, mark: str, model: Model, state: _State) -> None:
    tensors = _named("state:", _tensors(model.graph)) | _named("best:", state.best)
    for name, parameter in _trainable(model).items():
        for key, value in state.optimizer.state[parameter].items():
            if value is not None:
                tensors[f"optimizer:{key}:{name}"] = torch.as_tensor(value)
    header = {
        **{"mark": mark, "epoch": state.epoch, "chunk": state.chunk},
        **{"history": state.history, "best_epoch": state.best_epoch},
    }
    stored = {key: t.detach().cpu().contiguous().clone() for key, t in sorted(tensors.items())}
    write_atomically(path, to_bytes(stored, {"training": json.dumps(header)}))


def _resume(path: Path, mark: str, model: Model, state: _State) -> None:
    """Take the state from the file where it holds this same training."""
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["training"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        progress.say(f"{path.name} is not a whole checkpoint: training starts anew")
        return
    if header["mark"] != mark:
        progress.say(f"{path.name} is of another training: this one starts anew")
        return
    _copy_into(_tensors(model.graph), _under("state:", tensors))
    device = _device_of(model)
    state.best = {name: t.to(device) for name, t in _under("best:", tensors).items()}
    for name, parameter in _trainable(model).items():
        for key, value in _under("optimizer:", tensors).items():
            kind, _, owner = key.partition(":")
            if owner == name:
                state.optimizer.state[parameter][kind] = value.to(device)
    state.epoch, state.chunk = header["epoch"], header["chunk"]
    state.history, state.best_epoch = header["history"], header["best_epoch"]
    progress.say(f"  going on from {path.name} after epoch {state.epoch}")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
