"""Before any work: what a run would stumble over, and the model as it is."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.source import Samples
from paredown.core.task import SPLITS, Target, Task
from paredown.core.units import human
from paredown.data import batches, evaluate, feed, splits
from paredown.data.answer import notes_of
from paredown.data.feed import Batch
from paredown.data.load import load
from paredown.data.reading import Split
from paredown.data.splits import Survey
from paredown.graph import structure
from paredown.graph.capture import capture
from paredown.graph.doors.python_file import load_file, made_model, made_task
from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.graph.sites import sites
from paredown.measure import inputs
from paredown.run import arrival
from paredown.run.baseline import of_original
from paredown.run.reach import exported_bytes, students, unreachable
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.steps.training.distill import Distill
from paredown.targets.devices import device
from paredown.targets.runtimes import RUNTIMES, ready
from paredown.train.objective import task_loss

NEEDED = {
    "validation": "decisions are made on it",
    "test": "the final claim is made on it",
    "score": "it says how good an output is",
}


@dataclass
class Found:
    """What was found: problems to mend, notes to know, facts that hold."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def tried(self, what: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; None, and a problem, where it fails at doing ``what``."""
        try:
            return work()
        except UserError as error:
            self.problems += [line for line in str(error).split("\n") if line not in self.problems]
        except Exception as error:
            self.problems.append(f"{what} failed: {type(error).__name__}: {error}")
        return None


def check_file(
    file: Path,
    target: Target,
    recipe_file: Path | None = None,
    goals: Goals | None = None,
    samples: Samples | None = None,
) -> Found:
    """`check` of what a user's Python file makes, or of a model with samples; and of a recipe."""
    found, samples = Found(), samples or Samples()
    steps = found.tried("the recipe", lambda: recipe.load(recipe_file) if recipe_file else [])
    if file.suffix != ".py" or samples != Samples():
        loaded = found.tried(str(file), lambda: load(file, samples.data, samples.task))
        if loaded is not None:
            module, task = loaded
            _check(found, module, task, target, steps or [], goals or Goals())
            said = found.tried("parity", lambda: arrival.told(file, module, task))
            found.facts += [said] if said else []
        return found
    functions = found.tried(str(file), lambda: load_file(file))
    if functions is None:
        return found
    task = found.tried("task()", lambda: made_task(functions[1], file))
    module = found.tried("model()", lambda: made_model(functions[0], file))
    if task is not None:
        _check(found, module, task, target, steps or [], goals or Goals())
    return found


def check(
    module: nn.Module | Model,
    task: Task,
    target: Target,
    steps: Sequence[Step] = (),
    goals: Goals | None = None,
) -> Found:
    """Capture, export, score and differentiate one batch; every problem at once, and each goal
    that cannot be met."""
    found = Found()
    _check(found, module, task, target, steps, goals or Goals())
    return found


def _check(
    found: Found,
    module: nn.Module | Model | None,
    task: Task,
    target: Target,
    steps: Sequence[Step],
    goals: Goals,
) -> None:
    model, task = None, splits.prepared(task)
    if module is not None:
        model = found.tried("capture", lambda: capture(module, task.example, task.dynamic))
    _ask(found, model, task, target, steps)
    found.notes += notes_of(task)
    found.notes += found.tried("the data", lambda: unrepeated(task)) or []
    if model is None:
        return
    found.notes += [*model.notes, *filter(None, [own_zeros.told(own_zeros.found(model))])]
    parameters = sum(p.numel() for p in model.parameters())
    layers = len({site.weight for site in sites(model.graph)})
    found.facts.insert(0, f"captured: {parameters:,} parameters, {layers} layers with weights")
    exported = found.tried("export", lambda: _export(model, task, target, steps, goals))
    if exported is not None:
        size, missed = exported
        found.facts.append(f"exported to {target.runtime}, {size}; the file agrees with the model")
        found.problems += missed


def unrepeated(task: Task) -> list[str]:
    """A sentence for each split that gives another example when it is read again."""
    found = []
    for name in (name for name in SPLITS if _size(task, name)):
        place = splits.unrepeated(getattr(task, name), task.batch_size)
        if place is not None:
            found.append(
                f"{name}: example {place} is another one when it is read again, so a run cannot go "
                "on nor be replayed; draw from random, numpy.random or torch without a generator "
                "of your own, which are seeded for each example."
            )
    return found


def problems(model: Model, task: Task, target: Target, steps: Sequence[Step] = ()) -> list[str]:
    """What a run would stumble over, one sentence each; the export aside, this is quick."""
    found = Found()
    _ask(found, model, splits.prepared(task), target, steps)
    return found.problems


def _ask(
    found: Found, model: Model | None, task: Task, target: Target, steps: Sequence[Step]
) -> None:
    """Everything that can be asked of task, target and recipe, and one batch of each split."""
    lacking = task.missing(set(NEEDED))
    found.problems += [f"task: has no {name}; {NEEDED[name]}." for name in lacking]
    surveys: dict[str, Survey] = {}
    found.tried("the data", lambda: found.problems.extend(splits.problems(task, surveys)))
    found.tried("runtime", lambda: ready(target.runtime))
    found.problems += recipe.problems(steps, task, target if target.runtime in RUNTIMES else None)
    found.tried("device", lambda: device.device(target.device))
    found.problems += _students(model, task, steps)
    if model is None:
        return
    fits = [name for name in surveys if found.tried(name, partial(_fits, model, task, name))]
    known = len(found.problems)
    for name in fits if not known else ():
        found.tried(name, partial(_ends, model, task, name, surveys[name], labels=False))
    runs = len(found.problems) == known
    if "validation" in fits and task.score is not None and runs:
        if found.tried("task.score", lambda: _score(model, task)) is not None:
            found.facts.append(f"{_around(task)}scored one batch of validation")
    if "train" in fits and task.loss is not None and runs:
        if found.tried("task.loss", lambda: _differentiate(model, task)) is not None:
            found.facts.append("loss and gradients of one training batch are finite")
    if found.problems == []:
        for name in fits:
            found.tried(name, partial(_ends, model, task, name, surveys[name]))


def _around(task: Task) -> str:
    """What was done to a batch that was scored, besides."""
    data = splits.split(task, "validation")
    before = isinstance(data, Split) and data.preprocess is not None
    done = "preprocessed, " * before + "postprocessed, " * (task.postprocess is not None)
    return f"{done[:-2]} and " if done else ""


def _students(model: Model | None, task: Task, steps: Sequence[Step]) -> list[str]:
    """Why a student of the recipe or of the task cannot take the model's place."""
    if model is None:
        return []
    told = recipe.unfit([step for step in steps if not step.problems()], model, task)
    if task.student is None:
        return told
    step = Distill(student=task.student)
    told += [f"task: {problem}" for problem in step.problems() or step.unfit(model, task)]
    if task.train is None:
        told.append("task: names a student, and has no train split to teach it with.")
    return told


def _size(task: Task, split: str) -> int:
    """The examples of a split; 0 where it is missing, or has no length, which is told elsewhere."""
    examples = getattr(task, split)
    try:
        return 0 if examples is None else splits.size(examples)
    except UserError:
        return 0


def _first_batch(model: Model, task: Task, split: str) -> Batch:
    data = splits.split(task, split)
    return next(iter(feed.every(model, data, feed.size(model, task.batch_size), 1)))


def _fits(model: Model, task: Task, split: str) -> bool:
    """Whether the inputs of a split are those of the example; the last batch may be shorter."""
    inputs.leaves(model, _first_batch(model, task, split).inputs, inputs.of_split(split))
    return True


def _score(model: Model, task: Task) -> torch.Tensor:
    split = splits.split(task, "validation")
    few = min(splits.size(split), feed.size(model, task.batch_size))
    return evaluate.evaluate(model, Subset(split, range(few)), task)


def _differentiate(model: Model, task: Task) -> torch.Tensor | None:
    """The loss of one training batch; None where its inputs are NaN, which is told elsewhere."""
    assert task.loss is not None
    batch = _first_batch(model, task, "train")
    if not all(bool(torch.isfinite(leaf).all()) for leaf in structure.flatten(batch.inputs)[0]):
        return None
    feed.check_fills(model, splits.split(task, "train"), "train")
    with torch.random.fork_rng(devices=[]):
        copied = model.copy().train()
        loss = task_loss(task, batches.call(copied, batch.inputs), batch.target)
        loss.backward()
    grads = [p.grad for p in copied.parameters() if p.grad is not None]
    if not bool(torch.isfinite(loss)) or not all(bool(torch.isfinite(g).all()) for g in grads):
        raise UserError("task: the loss or its gradient on one training batch is NaN or infinite.")
    return loss.detach()


def _ends(model: Model, task: Task, name: str, survey: Survey, labels: bool = True) -> None:
    """Run the examples with the least and the largest numbers, where a table or the classes may
    have ended before.

    Args:
        labels: whether score and loss are run too.
    """
    data = splits.split(task, name)
    held = list(dict.fromkeys(example for _, example in survey.ends.values()))
    size = feed.size(model, task.batch_size)
    others = (n for n in range(splits.size(data)) if n not in held)
    chosen = [*held, *itertools.islice(others, max(0, size - len(held)))] if held else []
    with torch.random.fork_rng(devices=[]):
        for batch in feed.every(model, Subset(data, chosen), size):
            doing = "input"
            try:
                output = batches.call(model, batch.inputs)
                if not labels:
                    continue
                doing, target = "label", batches.padded(batch.target, batch.size)
                if name in ("validation", "test"):
                    evaluate.scored(task, output, target, batch.size)
                if task.loss is not None and target is not None:
                    task_loss(task, output, target)
            except Exception as error:
                if name != "train" and doing == "label" and not _is_index(error):
                    continue  # a loss may want other targets than those of the score
                raise UserError(_beyond(name, doing, survey, error)) from error


def _is_index(error: Exception) -> bool:
    """Whether it says that a number is beyond what it is an index of, or comes from the score."""
    return isinstance(error.__cause__, IndexError) or "task.score" in str(error)


def _beyond(name: str, kind: str, survey: Survey, error: Exception) -> str:
    """What failed on the ends of which numbers."""
    ends = sorted(end for (what, _), end in survey.ends.items() if what.startswith(kind))
    told = ", ".join(f"{number} in example {example}" for number, example in ends)
    reason = str(error).split("\n")[0].rstrip(".")
    if not isinstance(error, UserError):
        reason = f"the model failed: {type(error).__name__}: {reason}"
    return f"{name}: with its least and largest {kind}s ({told}): {reason}."


def _export(
    model: Model, task: Task, target: Target, steps: Sequence[Step], goals: Goals
) -> tuple[str, list[str]]:
    """The size of the exported model, and the goals that cannot be met."""
    whole, graph = exported_bytes(model, target)
    named = partial(students, model, task, steps)
    found = unreachable(goals, target, Measurement(whole), graph, named)
    return human("size", whole), list(found.values())


def baseline(
    model: Model,
    task: Task,
    target: Target,
    goals: Goals | None = None,
    steps: Sequence[Step] = (),
) -> tuple[Measurement, dict[str, str]]:
    """The exported original, measured alone on validation, and the goals that cannot be met, as
    `unreachable` tells them."""
    chosen = ready(target.runtime)
    with tempfile.TemporaryDirectory() as folder:

        def exported() -> Path:
            progress.say("Export the original and measure it")
            return chosen.lower(model, Path(folder) / f"original{chosen.SUFFIX}")

        found = of_original(model, task, target, exported)
    named = partial(students, model, task, steps)
    beyond = unreachable(goals or Goals(), target, found.measurement, found.graph_bytes, named)
    return found.measurement, beyond
