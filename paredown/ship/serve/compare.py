"""Two models' outputs for the same inputs: what is wrong with one, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Outputs = Mapping[str, np.ndarray]
TINY = 1e-12  # below which a model's outputs are all zero


def bad_numbers(outputs: Outputs) -> bool:
    """Whether there is a NaN or an infinity.

    Example:
        >>> bad_numbers({"y": np.array([1.0, np.inf])}), bad_numbers({"y": np.array([1])})
        (True, False)
    """
    floats = (array for array in outputs.values() if array.dtype.kind == "f")
    return any(not np.isfinite(array).all() for array in floats)


def wrong_shape(outputs: Outputs, expected: Sequence[Mapping[str, object]], rows: int) -> str:
    """What is wrong with names, types or shapes, in words; "" where they are as expected.

    Args:
        expected: the original's outputs, as a `Signature` has them; -1 fits any size.
        rows: of the request, which a first size of -1 must be; 0 where nothing is known.

    Example:
        >>> wrong_shape({"y": np.zeros((1, 2))}, [{"name": "y", "shape": [-1, 3]}], 1)
        "output 'y' has shape (1, 2), not (1, 3)"
    """
    names = [str(item["name"]) for item in expected]
    if list(outputs) != names:
        return f"outputs {', '.join(outputs)} instead of {', '.join(names)}"
    for item, array in zip(expected, outputs.values(), strict=True):
        shape = item["shape"]
        if not isinstance(shape, list):
            continue
        wanted = [rows if n == 0 and size == -1 and rows else size for n, size in enumerate(shape)]
        pairs = zip(wanted, array.shape, strict=False)
        if len(wanted) != array.ndim or any(size not in (-1, got) for size, got in pairs):
            sizes = ", ".join("any" if size == -1 else str(size) for size in wanted)
            return f"output {item['name']!r} has shape {array.shape}, not ({sizes})"
    return ""


@dataclass(frozen=True)
class Agreement:
    """How two models' outputs are to be compared.

    Attributes:
        kind: "classes": the first output holds a score for each class in its last dimension, and
            the models agree where they name the same class; "exact": whole numbers and texts, which
            must be the same; "near": the relative distance of all outputs is within ``bound``.
        bound: found at validation.
    """

    kind: str = "classes"
    bound: float = 0.0

    def agree(self, original: Outputs, candidate: Outputs) -> bool:
        """Whether they agree.

        Example:
            >>> one, other = {"y": np.array([[1.0, 2.0]])}, {"y": np.array([[0.0, 9.0]])}
            >>> Agreement("classes").agree(one, other), Agreement("near", 0.1).agree(one, other)
            (True, False)
        """
        if self.kind == "near":
            return distance(original, candidate) <= self.bound
        if self.kind == "exact":
            return distance(original, candidate) == 0
        first, second = (next(iter(each.values())) for each in (original, candidate))
        return first.shape == second.shape and bool(np.array_equal(guess(first), guess(second)))


def kind_of(outputs: Outputs) -> str:
    """How such outputs are compared, as an `Agreement` has it.

    Example:
        >>> kind_of({"y": np.zeros((1, 9))}), kind_of({"y": np.array([3])})
        ('classes', 'exact')
    """
    if holds_classes(outputs):
        return "classes"
    floats = any(array.dtype.kind == "f" for array in outputs.values())
    return "near" if floats else "exact"


def rows_of(outputs: Outputs, rows: int, most: int) -> list[Outputs]:
    """The outputs of each example, of the first ``most``; all as one where they are not by rows.

    Example:
        >>> [each["y"].tolist() for each in rows_of({"y": np.arange(3)}, 3, 2)]
        [[0], [1]]
    """
    if any(array.ndim == 0 or len(array) != rows for array in outputs.values()):
        return [outputs]
    picked = range(min(rows, most))
    return [{name: array[n : n + 1] for name, array in outputs.items()} for n in picked]


def guess(scores: np.ndarray) -> np.ndarray:
    """The class of the largest score: (..., C) -> (...)."""
    return scores.argmax(-1)


def holds_classes(outputs: Outputs) -> bool:
    """Whether outputs look like scores of classes: one output of floats, one vector an example.

    Example:
        >>> holds_classes({"y": np.zeros((4, 10))}), holds_classes({"y": np.zeros((4, 1))})
        (True, False)
    """
    arrays = list(outputs.values())
    return (
        len(arrays) == 1
        and arrays[0].dtype.kind == "f"
        and arrays[0].ndim == 2
        and arrays[0].shape[1] > 1
    )


def distance(original: Outputs, candidate: Outputs) -> float:
    """The norm of the difference over that of the original, all outputs as one vector; infinite
    where they cannot be compared, or only one of two numbers is finite.

    Example:
        >>> distance({"y": np.array([3.0, 4.0])}, {"y": np.array([3.0, 4.5])})
        0.1
    """
    apart = whole = 0.0
    if list(original) != list(candidate):
        return float("inf")
    for first, second in zip(original.values(), candidate.values(), strict=True):
        if first.shape != second.shape:
            return float("inf")
        if first.dtype == object or second.dtype == object:
            apart += float((first != second).sum())
            whole += float(first.size)
            continue
        a, b = first.astype(np.float64), second.astype(np.float64)
        same = np.isfinite(a) & np.isfinite(b)
        if (np.isfinite(a) != np.isfinite(b)).any():
            return float("inf")
        apart += float(((a - b)[same] ** 2).sum())
        whole += float((a[same] ** 2).sum())
    if apart == 0:
        return 0.0
    return float(np.sqrt(apart / max(whole, TINY)))
