"""A worker's model that is none: it scores outputs by a task's function, for labels come late.

A worker loads this file in place of its own model; it needs PyTorch and the user's file.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paredown.core.source import Source
from paredown.data import evaluate
from paredown.data.answer import by_labels
from paredown.data.load import task_of
from paredown.graph import structure
from paredown.ship.serve.nesting import of_names


class Model:
    """``task.score`` of one model's outputs; the last array is the target, one for each row."""

    def __init__(
        self,
        file: str,
        runtime_file: str,
        threads: int,
        source: str,
        names: Sequence[str],
        outputs: Any = None,
    ) -> None:
        self._task = by_labels(task_of(Source.from_json(source)))
        self._nesting = outputs or of_names(names)
        self.signature: dict[str, Any] = {}

    def warm_up(self) -> None:
        """Nothing is to be warmed."""

    def run(self, arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, float]]:
        """The mean score of the rows, (1,), and what it took in milliseconds."""
        start = time.perf_counter()
        *outputs, target = (torch.from_numpy(np.array(array)) for array in arrays)
        output = structure.unflatten(outputs, self._nesting)
        scores = evaluate.scored(self._task, output, target, len(target))
        spent = {"compute_ms": (time.perf_counter() - start) * 1e3}
        return [np.array([float(scores.mean())])], spent
