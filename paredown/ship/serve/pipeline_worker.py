"""A worker's model with the task around it: raw inputs in, what the task makes of outputs out.

A worker loads this file in place of its own model where `paredown serve` is to run end to end; it
needs PyTorch and the user's file. Preprocessing, the model and postprocessing are timed apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from paredown.core.errors import UserError
from paredown.core.source import Source
from paredown.data import evaluate, reading, splits
from paredown.data.load import task_of
from paredown.graph import structure
from paredown.ship.open import open as open_artifact
from paredown.ship.serve.nesting import of_names

SPLITS = ("validation", "test", "calibration", "train")
ALONE = "input"  # the name of an input, and "output" of an output, that has none of its own
COPIES = 3  # of the example, in the second run of the warm-up


class Model:
    """The artifact between a task's preprocessing and postprocessing.

    Attributes:
        signature: of the raw inputs, after the first example of the task's splits.
    """

    def __init__(
        self, file: str, runtime_file: str, threads: int, source: str, outputs: Any = None
    ) -> None:
        self.predictor = open_artifact(file, threads)
        self.task = task_of(Source.from_json(source))
        self._nesting = outputs or of_names(self.predictor.output_names)
        name = next((each for each in SPLITS if getattr(self.task, each) is not None), None)
        if name is None:
            raise UserError(
                f"{Source.from_json(source).file}: its task has no split that shows what comes in."
            )
        row = reading.examples(getattr(self.task, name), [0], 0)[0]
        self._example = named(reading.pair(row, name)[0], ALONE)
        self.signature: dict[str, Any] = {
            "inputs": [_described(key, value) for key, value in self._example.items()],
            "outputs": [],
            "batched": False,
            "runtime": self.predictor.runtime,
        }
        self._single = list(self._example) == [ALONE]
        self._positions = all(key.isdigit() for key in self._example)

    def run(self, arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, float]]:
        """What the task makes of a batch of raw inputs, and what took how many milliseconds."""
        found, spent = self._made(arrays)
        return list(found.values()), spent

    def warm_up(self) -> None:
        """Run the example alone and some copies of it, and learn the outputs.

        Raises:
            UserError: the task does not take its own example.
        """
        one = [np.stack([value]) for value in map(_array, self._example.values())]
        several = [np.concatenate([each] * COPIES) for each in one]
        first, other = self._made(one)[0], self._made(several)[0]
        rows = [(len(a), len(b)) if a.ndim and b.ndim else (0, 0) for a, b in _pairs(first, other)]
        self.signature["batched"] = all(each == (1, COPIES) for each in rows)
        self.signature["outputs"] = [
            {"name": name, "dtype": _dtype(array), "shape": _sizes(array, other[name])}
            for name, array in first.items()
        ]

    def _made(self, arrays: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        began = time.perf_counter()
        examples = ([array[n] for array in arrays] for n in range(len(arrays[0])))
        rows = [(self._preprocessed(each),) for each in examples]
        [inputs] = reading.collated(rows, "inputs", range(len(rows)))
        args, kwargs = splits.arguments(inputs)
        ready = time.perf_counter()
        found = self.predictor(*args, **kwargs)
        computed = time.perf_counter()
        output = structure.unflatten([torch.from_numpy(each) for each in found], self._nesting)
        if self.task.postprocess is not None:
            output = evaluate.postprocessed(self.task, output)
        told = {name: _array(value) for name, value in named(output, "output").items()}
        return told, {
            "preprocess_ms": (ready - began) * 1e3,
            "compute_ms": (computed - ready) * 1e3,
            "postprocess_ms": (time.perf_counter() - computed) * 1e3,
        }

    def _preprocessed(self, values: Sequence[Any]) -> Any:
        """One example's inputs, nested as the split has them, after the task's preprocessing."""
        leaves = [_leaf(value) for value in values]
        example: Any = dict(zip(self._example, leaves, strict=True))
        if self._single:
            example = leaves[0]
        elif self._positions:
            example = tuple(leaves)
        return example if self.task.preprocess is None else self.task.preprocess(example)


def named(value: Any, alone: str) -> dict[str, Any]:
    """The parts of a value by name: a dict's keys, a tuple's places, or the value itself.

    Example:
        >>> named({"a": 1}, "input"), named((1, 2), "input"), named("text", "input")
        ({'a': 1}, {'0': 1, '1': 2}, {'input': 'text'})
    """
    if isinstance(value, Mapping):
        return {str(key): each for key, each in value.items()}
    if isinstance(value, tuple):
        return {str(place): each for place, each in enumerate(value)}
    return {alone: value}


def _leaf(value: Any) -> Any:
    """One raw value as a task takes it: a text, or a tensor."""
    if isinstance(value, bytes):
        return value.decode()
    return torch.from_numpy(np.array(value))


def _array(value: Any) -> np.ndarray:
    """A value as an array of numbers or texts; what is neither becomes one text of JSON a row."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
    if isinstance(value, (str, bytes)):
        return _texts(value)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of several lengths
        array = np.asarray(None)
    if array.dtype.kind in "biuf":
        return array
    if array.dtype.kind in "SU":
        flat = [_texts(each).item() for each in array.ravel().tolist()]
        return _objects(flat).reshape(array.shape)
    rows = value if isinstance(value, (list, tuple)) else [value]
    return _objects([json.dumps(row, default=_plain).encode() for row in rows])


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _texts(value: str | bytes) -> np.ndarray:
    return _objects([value.encode() if isinstance(value, str) else value]).reshape(())


def _objects(texts: Sequence[bytes]) -> np.ndarray:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def _dtype(array: np.ndarray) -> str:
    return "str" if array.dtype == object else array.dtype.name


def _described(name: str, value: Any) -> dict[str, Any]:
    """A raw input; all its sizes may vary, for what the task takes only the task knows."""
    array = _array(value)
    sizes = [["batch", 1, None], *(["?", 0, None] for _ in array.shape)]
    return {"name": name, "dtype": _dtype(array), "shape": sizes}


def _pairs(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(array, other[name]) for name, array in one.items()]


def _sizes(one: np.ndarray, other: np.ndarray) -> list[int] | None:
    """The batch varies; of an output after the task's own code nothing else is promised."""
    if one.ndim != other.ndim:
        return None
    return [a if a == b else -1 for a, b in zip(one.shape, other.shape, strict=True)]
