"""What is kept of recent requests: answers for late labels, and examples for the page.

Everything is bounded, in number, in bytes and in time.
"""

from __future__ import annotations

import base64
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paredown.ship.serve.compare import Outputs, guess, holds_classes

MOST_ANSWERS, MOST_BYTES, LONGEST_S = 10_000, 2**26, 3600.0
MOST_EXAMPLES = 24
LARGEST_SIDE = 64  # pixels of a picture on the page
EXAMPLE_EACH_S = 0.2  # at most one example of each kind in that time, so that none crowds the rest


@dataclass
class Entry:
    """What is kept of one request; ``scores`` of its first label, by which it is scored once."""

    born: float
    outputs: dict[str, Outputs] = field(default_factory=dict)  # by model
    scores: dict[str, float] = field(default_factory=dict)
    nbytes: int = 0


class Kept:
    """Recent answers by the request's id, and recent examples.

    Args:
        monotonic: a clock in seconds.

    Example:
        >>> kept = Kept()
        >>> kept.answered("7", "original", {"y": np.array([[0.0, 1.0]])})
        >>> kept.entry("7").outputs["original"]["y"].tolist(), kept.entry("8")
        ([[0.0, 1.0]], None)
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._answers: OrderedDict[str, Entry] = OrderedDict()
        self._nbytes = 0
        self._examples: deque[dict[str, Any]] = deque(maxlen=MOST_EXAMPLES)
        self._last: dict[str, float] = {}

    def answered(self, name: str, model: str, outputs: Outputs) -> None:
        """Keep what a model gave for the request of that name."""
        now = self._monotonic()
        entry = self._answers.get(name)
        if entry is None or model in entry.outputs:  # a name that is used again is a new request
            self._forget(name)
            entry = self._answers[name] = Entry(now)
        entry.outputs[model] = {key: array.copy() for key, array in outputs.items()}  # of a batch
        size = sum(array.nbytes for array in outputs.values()) + len(name)
        entry.nbytes += size
        self._nbytes += size
        while self._answers and self._too_much(now):
            self._forget(next(iter(self._answers)))

    def _too_much(self, now: float) -> bool:
        oldest = next(iter(self._answers.values()))
        many = len(self._answers) > MOST_ANSWERS or self._nbytes > MOST_BYTES
        return many or now - oldest.born > LONGEST_S

    def _forget(self, name: str) -> None:
        entry = self._answers.pop(name, None)
        self._nbytes -= entry.nbytes if entry else 0

    def entry(self, name: str) -> Entry | None:
        """What each model gave for a request; None where that is not known any more."""
        entry = self._answers.get(name)
        if entry is None or self._monotonic() - entry.born > LONGEST_S:
            return None
        return entry

    def fell_back(
        self,
        kind: str,
        why: str,
        arrays: Sequence[np.ndarray],
        candidate: Outputs | None,
        original: Outputs,
        shadow: bool = False,
    ) -> None:
        """Keep a request that the original answered in the candidate's place, or that the two
        answered differently (``kind`` "disagree")."""
        now = self._monotonic()
        if now - self._last.get(kind, -EXAMPLE_EACH_S) < EXAMPLE_EACH_S:
            return
        self._last[kind] = now
        self._examples.appendleft(
            {
                "time_s": time.time(),
                "kind": kind,
                "why": why,
                "shadow": shadow,
                "original": said(original),
                "candidate": said(candidate) if candidate else "",
                "picture": picture(arrays[0]) if arrays else None,
                "inputs": "" if not arrays else told(arrays[0]),
            }
        )

    def examples(self) -> list[dict[str, Any]]:
        """The recent ones, the newest first."""
        return list(self._examples)


def said(outputs: Outputs) -> str:
    """The first example's outputs in a few characters.

    Example:
        >>> said({"y": np.array([[0.1, 0.9]])}), said({"y": np.array([1.5])})
        ('class 1', '1.5')
    """
    if holds_classes(outputs):
        [first] = outputs.values()
        row = first[0] if len(first) else np.zeros(1)
        return f"class {guess(row)}" if np.isfinite(row).all() else "NaN or infinity"
    return told(next(iter(outputs.values()), np.empty(0)))


def told(array: np.ndarray) -> str:
    """The first numbers of an array."""
    if array.dtype == object:
        texts = (each.decode(errors="replace")[:40] for each in array.ravel()[:3])
        return ", ".join(texts)
    numbers = [f"{value:.4g}" for value in array.ravel()[:4].astype(np.float64)]
    return ", ".join(numbers) + (" ..." if array.size > 4 else "")


def picture(array: np.ndarray) -> dict[str, Any] | None:
    """The first example of a batch of pictures, (B, C, H, W) with 1 or 3 channels, as bytes of grey
    or RGB; None of anything else.

    Example:
        >>> picture(np.zeros((1, 1, 8, 8)))["size"], picture(np.zeros((1, 9)))
        ([8, 8, 1], None)
    """
    if array.ndim != 4 or array.dtype.kind not in "biuf" or array.shape[1] not in (1, 3):
        return None
    channels, height, width = array.shape[1:]
    if not len(array) or min(height, width) < 4:
        return None
    stride = -(-max(height, width) // LARGEST_SIDE)
    pixels = np.nan_to_num(array[0, :, ::stride, ::stride].astype(np.float64).transpose(1, 2, 0))
    low, high = float(pixels.min()), float(pixels.max())
    grey = np.clip((pixels - low) / max(high - low, 1e-12) * 255, 0, 255).astype(np.uint8)
    return {"size": list(grey.shape), "pixels": base64.b64encode(grey.tobytes()).decode()}
