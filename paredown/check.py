"""Before any work: what a run would stumble over, and the model as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paredown import data, progress, recipe
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.measure import measure
from paredown.runtimes import runtime
from paredown.types import Measurement, Step, Target, Task, UserError


@dataclass
class Check:
    """What was found: problems to mend, notes to know, facts that hold."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def check(module: Any, task: Task, target: Target, steps: Sequence[Step] = ()) -> Check:
    """Capture, export, score and differentiate one batch; every problem at once."""
    found = Check()
    lacking = task.missing({"validation", "test"})
    found.problems += [f"task: has no {name} split." for name in lacking]
    found.problems += data.problems(task) + recipe.problems(steps, task)
    model = _tried(found, lambda: capture(module, task.example, task.dynamic))
    if model is None:
        return found
    found.notes += model.notes
    parameters = sum(p.numel() for p in model.parameters())
    layers = len({site.weight for site in sites(model.graph)})
    found.facts.append(f"captured: {parameters:,} parameters, {layers} layers with weights")
    if _tried(found, lambda: _export(model, target)) is not None:
        found.facts.append(f"exported to {target.runtime}; the file agrees with the model")
    if not lacking and _tried(found, lambda: _score(model, task)) is not None:
        found.facts.append("scored one batch of validation")
    if task.train is not None and task.loss is not None:
        if _tried(found, lambda: _differentiate(model, task)) is not None:
            found.facts.append("loss and gradients of one training batch are finite")
    return found


def _tried(found: Check, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except UserError as error:
        found.problems.append(str(error))
    except Exception as error:
        found.problems.append(f"task: {type(error).__name__}: {error}")
    return None


def _export(model: Model, target: Target) -> int:
    chosen = runtime(target.runtime)
    with tempfile.TemporaryDirectory() as folder:
        path: Path = chosen.lower(model, Path(folder) / f"model{chosen.SUFFIX}")
        return path.stat().st_size


def _first_batch(task: Task, split: str) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    inputs, target = next(data.batches(data.split(task, split), task.batch_size))
    return (*data.arguments(inputs), target)


def _score(model: Model, task: Task) -> torch.Tensor:
    args, kwargs, target = _first_batch(task, "validation")
    with torch.no_grad():
        scores = task.score(model(*args, **kwargs), target)
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(target),):
        shape = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise UserError(
            f"task: score must give one number per example, ({len(target)},); it gave {shape}."
        )
    return scores


def _differentiate(model: Model, task: Task) -> torch.Tensor:
    assert task.loss is not None
    args, kwargs, target = _first_batch(task, "train")
    copied = model.copy().train()
    loss = task.loss(copied(*args, **kwargs), target)
    loss.backward()
    grads = [p.grad for p in copied.parameters() if p.grad is not None]
    if not bool(torch.isfinite(loss)) or not all(bool(torch.isfinite(g).all()) for g in grads):
        raise UserError("task: the loss or its gradient on one training batch is NaN or infinite.")
    return loss.detach()


def baseline(model: Model, task: Task, target: Target) -> Measurement:
    """The exported original, measured alone on validation."""
    progress.say("Export the original and measure it")
    chosen = runtime(target.runtime)
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.lower(model, Path(folder) / f"original{chosen.SUFFIX}")
        return measure({"original": path}, model, task, target)["original"].measurement
