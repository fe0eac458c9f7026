"""Requests joined into one batch, and its outputs parted again: pure functions of arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, TypeVar

import numpy as np


class Joined(Protocol):
    """Something that waits for a batch: what may go together has one key."""

    @property
    def rows(self) -> int: ...
    @property
    def key(self) -> Hashable: ...


J = TypeVar("J", bound=Joined)


def key_of(arrays: Sequence[np.ndarray], batched: bool) -> Hashable:
    """What requests must have in common to be joined: None of one that must run alone.

    Example:
        >>> key_of([np.zeros((2, 3))], True) == key_of([np.zeros((5, 3))], True)
        True
    """
    if not batched or any(array.ndim == 0 for array in arrays):
        return None
    if len({len(array) for array in arrays}) != 1 or not len(arrays[0]):
        return None
    return tuple((array.dtype.char, array.shape[1:]) for array in arrays)


def take(waiting: deque[J], most: int, live: Callable[[J], bool] = lambda _: True) -> list[J]:
    """Take from the queue the first that is live, and those behind it that go with it.

    They are neighbours in the queue, so none overtakes another. At most ``most`` rows come
    together, but for a first one that is larger.

    Example:
        >>> from types import SimpleNamespace as Job
        >>> waiting = deque(Job(rows=1, key=key) for key in "aaab")
        >>> [job.key for job in take(waiting, 2)], len(waiting)
        (['a', 'a'], 2)
    """
    found: list[J] = []
    rows = 0
    while waiting:
        first = waiting[0]
        if not live(first):
            waiting.popleft()
            continue
        alone = first.key is None or (found and first.key != found[0].key)
        if found and (alone or rows + first.rows > most):
            break
        found.append(waiting.popleft())
        rows += first.rows
        if first.key is None:
            break
    return found


def join(each: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The arrays of several requests, one after the other along the first dimension."""
    if len(each) == 1:
        return [np.require(array, requirements=("C",)) for array in each[0]]
    return [np.concatenate(arrays) for arrays in zip(*each, strict=True)]


def part(outputs: Sequence[np.ndarray], rows: Sequence[int]) -> list[list[np.ndarray]]:
    """The outputs of each request; where there is one, all of them, whatever their shape.

    Raises:
        ValueError: an output does not have a row for each example.

    Example:
        >>> [each[0].tolist() for each in part([np.arange(3)], [1, 2])]
        [[0], [1, 2]]
    """
    if len(rows) == 1:
        return [list(outputs)]
    if any(array.ndim == 0 or len(array) != sum(rows) for array in outputs):
        raise ValueError("an output does not have a row for each example of the batch")
    ends = np.cumsum(rows)
    return [
        [array[end - count : end] for array in outputs]
        for end, count in zip(ends, rows, strict=True)
    ]
