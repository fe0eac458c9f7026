"""Goals that nothing can meet here, told before any work."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.core.units import Limit, human
from paredown.graph.model import Model
from paredown.measure.memory import Floor, floor
from paredown.steps.step import Step
from paredown.steps.training.distill import Distill
from paredown.targets.artifact import size_bytes
from paredown.targets.runtimes import ready
from paredown.train.distill.student import found as student

STEERS_YET = {"size", "latency", "throughput"}  # steps bring these nearer, though not to the goal
FLOORS = ("memory", "latency", "throughput", "energy")  # goals that a model of one op may miss


def unreachable(
    goals: Goals,
    target: Target,
    original: Measurement,
    graph: int,
    students: Callable[[], Sequence[Model]] = list,
) -> dict[str, str]:
    """Goal -> a sentence, for each goal that no step can meet on this target.

    Args:
        original: what was measured of the exported original; its size alone may be known.
        graph: bytes of that which are no weights.
        students: gives the models that may take the original's place.
    """
    found = {"size": _size(goals.size, original.size_bytes, graph, target, students)}
    if any(getattr(goals, name) is not None for name in FLOORS):
        lowest = floor(target)
        found["memory"] = _memory(goals.memory, target, lowest)
        found["latency"] = _latency(goals.latency, target, original, lowest)
        found["throughput"] = _throughput(goals.throughput, target, original, lowest)
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


def _latency(
    limit: Limit | str | None, target: Target, original: Measurement, lowest: Floor
) -> str:
    if not isinstance(limit, Limit) or (limit.relative and not original.latency_ms_p50):
        return ""
    wanted = limit.absolute(original.latency_ms_p50 or 0.0)
    if wanted >= lowest.latency_ms:
        return ""
    return (
        f"latency: the goal is {human('latency', wanted)}, and {target.runtime} takes "
        f"{human('latency', lowest.latency_ms)} for a model of one op at its quickest; ask for "
        "more than that."
    )


def _throughput(
    limit: Limit | str | None, target: Target, original: Measurement, lowest: Floor
) -> str:
    """A batch after the other, each of which takes what a model of one op takes, or more."""
    each_s, latency = original.throughput_per_s, original.latency_ms_p50
    if not isinstance(limit, Limit) or not each_s or not latency:
        return ""
    most = each_s * latency / lowest.latency_ms
    if limit.absolute(each_s) <= most:
        return ""
    return (
        f"throughput: the goal is {human('throughput', limit.absolute(each_s))}, and "
        f"{target.runtime} gives at most {human('throughput', most)} with a model of one op at its "
        "quickest; ask for less than that."
    )
