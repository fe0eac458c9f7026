"""Goals that nothing can meet here, told before any work."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from paredown.core.goals import Goals
from paredown.core.task import Target, Task
from paredown.core.units import Limit, human
from paredown.graph.model import Model
from paredown.measure.memory import Floor, floor
from paredown.steps.step import Step
from paredown.steps.training.distill import Distill
from paredown.targets.artifact import size_bytes
from paredown.targets.runtimes import ready
from paredown.train.distill.student import found as student

STEERS_YET = {"size"}  # steps bring it nearer, though not to the goal


def unreachable(
    goals: Goals,
    target: Target,
    whole: int,
    graph: int,
    students: Callable[[], Sequence[Model]] = list,
) -> dict[str, str]:
    """Goal -> a sentence, for each goal that no step can meet on this target.

    Args:
        whole: bytes of the exported original.
        graph: what of that are no weights.
        students: gives the models that may take the original's place.
    """
    found = {"size": _size(goals.size, whole, graph, target, students)}
    if goals.memory is not None or goals.energy is not None:
        lowest = floor(target)
        found["memory"] = _memory(goals.memory, target, lowest)
        if goals.energy is not None and not lowest.metered:
            found["energy"] = (
                "energy: no meter can be read here, so this goal cannot be met; leave it out, or "
                "measure on a machine that lets you read /sys/class/powercap."
            )
    return {goal: sentence for goal, sentence in found.items() if sentence}


def steering(goals: Goals, beyond: Collection[str]) -> Goals:
    """The goals that say what is tried and kept: not those on which no step has any influence.

    Example:
        >>> steering(Goals(size="0.5x", memory="1MB"), ["memory"]) == Goals(size="0.5x")
        True
    """
    without: dict[str, Any] = dict.fromkeys(set(beyond) - STEERS_YET)
    return dataclasses.replace(goals, **without)


def students(model: Model, task: Task, steps: Sequence[Step]) -> list[Model]:
    """The models that a recipe or the task names to take the original's place."""
    named = [step for step in steps if isinstance(step, Distill)]
    if task.student is not None:
        named.append(Distill(student=task.student))
    return [
        student(step.student, task, model, step.scale(), step.seed)
        for step in named
        if step.student is not None
    ]


def exported_bytes(model: Model, target: Target) -> tuple[int, int]:
    """The size of a model's exported file, and what of that are no weights."""
    chosen = ready(target.runtime)
    with tempfile.TemporaryDirectory() as folder:
        path: Path = chosen.lower(model, Path(folder) / f"model{chosen.SUFFIX}")
        whole = size_bytes(path)
        return whole, max(0, whole - sum(chosen.census(path).bytes_by_dtype.values()))


def _size(
    limit: Limit | str | None,
    whole: int,
    graph: int,
    target: Target,
    students: Callable[[], Sequence[Model]],
) -> str:
    """Steps change weights; of the graph around them they change little, unless a student's takes
    its place."""
    if not isinstance(limit, Limit) or limit.absolute(whole) > graph:
        return ""
    if any(exported_bytes(each, target)[1] < limit.absolute(whole) for each in students()):
        return ""
    return (
        f"size: the goal is {human('size', limit.absolute(whole))}, and of the original's "
        f"{human('size', whole)} {human('size', graph)} are the graph without any weights; ask for "
        "more than that, or name a student of fewer layers."
    )


def _memory(limit: Limit | str | None, target: Target, lowest: Floor) -> str:
    if not isinstance(limit, Limit):
        return ""
    if lowest.memory_bytes is None:
        return "memory: this system does not tell a process's peak, so its goal cannot be met."
    if limit.relative or limit.value > lowest.memory_bytes:
        return ""
    return (
        f"memory: the goal is {human('memory', limit.value)}, and {target.runtime} takes "
        f"{human('memory', lowest.memory_bytes)} with a model of one op; ask for more than that, "
        'or for a share of what the model adds, such as "0.5x".'
    )
