"""How long what surrounds a model takes: the task's preprocessing and postprocessing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch

from paredown.core.task import Task
from paredown.data import evaluate, splits
from paredown.data.reading import Split
from paredown.graph import machine, structure
from paredown.graph.model import Model
from paredown.measure.inputs import CYCLE, deployed_batch

LEAST, MOST, BUDGET_S = 5, 200, 0.5  # samples, and the time that they take together


def preprocess_ms(task: Task, model: Model, split: str) -> float | None:
    """The median of preprocessing what one inference takes, as many examples as are deployed
    together, on the first ones of a split; None where there is none."""
    data = splits.split(task, split)
    if not isinstance(data, Split) or data.preprocess is None:
        return None
    batch, preprocess = deployed_batch(model), data.preprocess
    count = min(len(data), CYCLE * batch)
    raw = [data.raw(index) for index in range(count)]
    groups = [[raw[(start + n) % count] for n in range(batch)] for start in range(0, count, batch)]
    return _median_ms(lambda group: [preprocess(each) for each in group], groups)


def postprocess_ms(
    task: Task, model: Model, outputs: Sequence[Sequence[np.ndarray]]
) -> float | None:
    """The median of postprocessing one inference's outputs; None where there is none."""
    if task.postprocess is None:
        return None
    given = [
        structure.unflatten([torch.from_numpy(array) for array in arrays], model.outputs)
        for arrays in outputs
    ]
    return _median_ms(lambda output: evaluate.postprocessed(task, output), given)


def _median_ms(work: Callable[[Any], Any], given: Sequence[Any]) -> float:
    """Of one call, the values taken in turn; the first round is not counted."""
    taken: list[float] = []
    with machine.same_numbers(0), torch.no_grad():
        work(given[0])
        until = perf_counter() + BUDGET_S
        while len(taken) < LEAST or (len(taken) < MOST and perf_counter() < until):
            start = perf_counter()
            work(given[len(taken) % len(given)])
            taken.append(1000 * (perf_counter() - start))
    return statistics.median(taken)
