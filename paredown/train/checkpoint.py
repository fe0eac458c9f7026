"""Where a training stands: one file that a killed training goes on from, to the same bits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from paredown.core import progress
from paredown.core.files import write_atomically
from paredown.core.task import Task
from paredown.data import splits
from paredown.graph.holds.every import HOLDS
from paredown.graph.model import Model
from paredown.train.parameters import copy_into, tensors, trainable

if TYPE_CHECKING:
    from paredown.train.settings import Training


@dataclass
class State:
    """Where a training stands; `write` and `resume` keep all of it."""

    optimizer: torch.optim.Optimizer
    batch: int  # examples per optimiser step
    chunk: int  # examples that fit into memory at once
    extra: dict[str, nn.Parameter] = field(default_factory=dict)  # trained beside the model
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1  # -1 is the model as it came
    start: float | None = None  # its score, with `Training.patience`


def mark_of(model: Model, task: Task, settings: Training, objective: str = "") -> str:
    """What a checkpoint must agree with: the model before training, settings, sizes of the data,
    and what is minimised, where that is not the task's loss."""
    sizes = [splits.size(s) for s in (task.train, task.validation) if s is not None]
    asked = [asdict(settings), sizes, task.batch_size, objective]
    digest = hashlib.sha256(json.dumps(asked).encode())
    digest.update(model.graph.code.encode())
    also = {f"{hold.field}:{name}": t for hold in HOLDS for name, t in hold.mark(model)}
    for name, tensor in sorted({**tensors(model.graph), **also}.items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(path: Path, mark: str, model: Model, state: State) -> None:
    """Replace the file by where the training of that mark stands now."""
    found = _named("state:", tensors(model.graph)) | _named("best:", state.best)
    found |= _named("extra:", dict(state.extra))
    for name, parameter in (trainable(model) | _named("extra:", dict(state.extra))).items():
        for key, value in state.optimizer.state[parameter].items():
            if value is not None:
                found[f"optimizer:{key}:{name}"] = torch.as_tensor(value)
    header = {
        **{"mark": mark, "epoch": state.epoch, "chunk": state.chunk},
        **{"history": state.history, "best_epoch": state.best_epoch, "start": state.start},
    }
    stored = {key: t.detach().cpu().contiguous().clone() for key, t in sorted(found.items())}
    write_atomically(path, to_bytes(stored, {"training": json.dumps(header)}))


def resume(path: Path, mark: str, model: Model, state: State) -> None:
    """Take the weights and the state from the file where it holds the training of that mark."""
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["training"])
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError):
        progress.say(f"{path.name} is not a whole checkpoint: training starts anew")
        return
    if header["mark"] != mark:
        progress.say(f"{path.name} is of another training: this one starts anew")
        return
    named = trainable(model)
    device = next(iter(named.values())).device
    copy_into(tensors(model.graph), _under("state:", found))
    copy_into(dict(state.extra), _under("extra:", found))
    named |= {f"extra:{name}": tensor for name, tensor in state.extra.items()}
    state.best = {name: t.to(device) for name, t in _under("best:", found).items()}
    for key, value in _under("optimizer:", found).items():
        kind, _, owner = key.partition(":")
        if owner in named:  # what is frozen since is not trained on
            state.optimizer.state[named[owner]][kind] = value.to(device)
    state.epoch, state.chunk = header["epoch"], header["chunk"]
    state.history, state.best_epoch = header["history"], header["best_epoch"]
    state.start = header["start"]
    progress.say(f"  going on from {path.name} after epoch {state.epoch}")


def _named(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


def _under(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
