"""The original as it is: measured once for all verbs of a session, and kept by content."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from paredown.core import cache
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.data import feed, splits
from paredown.data.evaluate import evaluate
from paredown.graph import store
from paredown.graph.model import Model
from paredown.measure.measure import measure
from paredown.measure.memory import floor, machine
from paredown.run.identity import ignore_of, where
from paredown.targets.runtimes import runtime

LASTS_S = 3600.0  # a machine's speed drifts


@dataclass(frozen=True)
class Baseline:
    """The original's measurement, what of its file are no weights, and how long it took."""

    measurement: Measurement
    graph_bytes: int
    seconds: float


def of_original(model: Model, task: Task, target: Target, exported: Callable[[], Path]) -> Baseline:
    """The exported original on validation, measured alone, in as many rounds as a first look takes.

    What was measured in the last hour of the same model, data and score, by the same versions on
    this machine, is not measured again; see `paredown.core.cache`. A score is known by the file it
    is written in and by what it gives of the first batch, which follows what that file calls.

    Args:
        exported: gives the exported original where it is measured.
    """

    def made() -> dict[str, Any]:
        file = exported()
        floor(target)  # found but once, so that it counts in no estimate
        began = time.monotonic()
        measured = measure({"original": file}, model, task, target, questions=())
        weights = sum(runtime(target.runtime).census(file).bytes_by_dtype.values())
        found = measured["original"].measurement
        graph = max(0, found.size_bytes - weights)
        return dataclasses.asdict(Baseline(found, graph, time.monotonic() - began))

    code = [_code(each) for each in (task.score, task.preprocess, task.postprocess)]
    if None in code:
        return _read(made())
    return cache.kept("baseline", _key(model, task, target, code), made, _read, LASTS_S)


def _read(found: dict[str, Any]) -> Baseline:
    return Baseline(**found | {"measurement": Measurement(**found["measurement"])})


def _key(model: Model, task: Task, target: Target, code: list[str | None]) -> dict[str, Any]:
    data = splits.split(task, "validation")
    few = range(min(splits.size(data), feed.size(model, task.batch_size)))
    return {
        "model": store.digest(model),
        "data": splits.fingerprint(data),
        "scores": [float(f"{score:.5g}") for score in evaluate(model, Subset(data, few), task)],
        "batch_size": task.batch_size,
        **ignore_of(task),
        "code": code,
        "target": where(target),
        "machine": machine(target),
    }


def _code(function: Any) -> str | None:
    """The file that a function is written in, by content, "" where there is no function; None where
    there is nothing to look at."""
    if function is None:
        return ""
    try:
        path = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (TypeError, OSError):
        return None
