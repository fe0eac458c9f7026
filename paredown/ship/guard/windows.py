"""Windows of a minute or so: what the page draws, and what the guards of a window look at."""

from __future__ import annotations

from collections import deque
from typing import Any

from paredown.ship.guard.tally import ModelTally, Tally, quantile_ms

KEPT = 240  # windows for the charts


class Window:
    """Counts of one window.

    Example:
        >>> window = Window(start_s=0.0)
        >>> window.add(Tally())
        >>> window.idle
        True
    """

    def __init__(self, start_s: float):
        self.start_s = start_s  # by the wall clock, for the chart alone
        self.original, self.candidate = ModelTally(), ModelTally()
        self.pairs = self.disagreements = 0
        self.distance, self.distances = 0.0, 0
        self.memory_bytes: float | None = None
        self.queue: float | None = None
        self.routed = False

    @property
    def idle(self) -> bool:
        """Whether no request came at all."""
        return not (self.routed or self.original.seen or self.candidate.seen)

    def add(self, tally: Tally) -> None:
        """Take in what came since the last look."""
        for ours, new in ((self.original, tally.original), (self.candidate, tally.candidate)):
            ours.answers += new.answers
            ours.shadows += new.shadows
            ours.latency += new.latency
            ours.labels += new.labels
            ours.score += new.score
            for kind, count in new.faults.items():
                ours.faults[kind] = ours.faults.get(kind, 0) + count
        self.pairs += tally.pairs
        self.disagreements += tally.disagreements
        self.distance += tally.distance
        self.distances += tally.distances
        self.memory_bytes = _most(self.memory_bytes, tally.memory_bytes)
        self.queue = _most(self.queue, tally.queue)
        self.routed |= tally.routed

    def to_json(self, stage: str, weight: int) -> dict[str, Any]:
        """The record that the page draws."""
        return {
            "start_s": self.start_s,
            "stage": stage,
            "weight": weight,
            "original": _told(self.original),
            "candidate": _told(self.candidate),
            "pairs": self.pairs,
            "disagreements": self.disagreements,
            "distance": self.distance / self.distances if self.distances else None,
            "memory_bytes": self.memory_bytes,
            "queue": self.queue,
        }


class Windows:
    """The window that is open, and the records of the last 240."""

    def __init__(self, start_s: float):
        self.open = Window(start_s)
        self.passed_s = 0.0
        self.records: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def close(self, stage: str, weight: int, start_s: float) -> Window:
        """End the open window, and open another."""
        ended, self.open, self.passed_s = self.open, Window(start_s), 0.0
        self.records.append(ended.to_json(stage, weight))
        return ended


def _most(one: float | None, other: float | None) -> float | None:
    there = [each for each in (one, other) if each is not None]
    return max(there) if there else None


def _told(model: ModelTally) -> dict[str, Any]:
    return {
        "answers": model.answers,
        "shadows": model.shadows,
        "faults": dict(model.faults),
        "p50_ms": quantile_ms(model.latency, 0.50),
        "p99_ms": quantile_ms(model.latency, 0.99),
        "score": model.score / model.labels if model.labels else None,
    }
