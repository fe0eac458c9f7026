"""What came in since the last look: counts and a few samples, of bounded size at any load."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from paredown.ship.guard.observation import CANDIDATE, Observation

SLOT_S = 0.05  # of each model, one latency is sampled in each: one stall is not many slow answers
MOST_SAMPLES = 64  # of inputs, and of outputs
MOST_LABELS = 10_000
MOST_LATENCIES = 10_000
# Latencies are counted in bins, each 2.5 % above the one before, from 10 microseconds on.
FIRST_MS, GROWTH, BINS = 0.01, 1.025, 760
Batch = Mapping[str, np.ndarray]


def bin_of(latency_ms: float) -> int:
    """The bin of a latency.

    Example:
        >>> bin_of(0.0), bin_of(1e9)
        (0, 759)
    """
    if latency_ms <= FIRST_MS:
        return 0
    return min(BINS - 1, int(np.log(latency_ms / FIRST_MS) / np.log(GROWTH)) + 1)


def quantile_ms(counts: np.ndarray, share: float) -> float | None:
    """The latency below which a share of the answers lies, to 2.5 %; None where there is none.

    Example:
        >>> counts = np.zeros(BINS, int)
        >>> counts[[bin_of(1.0), bin_of(100.0)]] = 99, 1
        >>> round(quantile_ms(counts, 0.5), 1)
        1.0
    """
    total = counts.sum()
    if not total:
        return None
    at = int(np.searchsorted(np.cumsum(counts), np.ceil(share * total)))
    return float(FIRST_MS * GROWTH ** (at - 0.5)) if at else FIRST_MS


@dataclass
class ModelTally:
    """Of one model."""

    answers: int = 0  # to clients
    shadows: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    latency: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    quiet: list[float] = field(default_factory=list)  # sampled without shadows beside, in ms
    slot: int = -1  # of the last sample
    labels: int = 0
    score: float = 0.0  # sum over the labels

    @property
    def seen(self) -> int:
        """Answers to clients, and beside them."""
        return self.answers + self.shadows

    @property
    def faulty(self) -> int:
        """Faults of all kinds."""
        return sum(self.faults.values())


@dataclass
class Tally:
    """Everything since the last look.

    Example:
        >>> tally = Tally()
        >>> tally.add(Observation("candidate", shadow=True, agreed=False), now=0.0, quiet=False)
        >>> tally.pairs, tally.disagreements, tally.candidate.seen
        (1, 1, 1)
    """

    original: ModelTally = field(default_factory=ModelTally)
    candidate: ModelTally = field(default_factory=ModelTally)
    pairs: int = 0
    disagreements: int = 0
    distance: float = 0.0  # sum over the pairs that told one
    distances: int = 0
    drops: list[float] = field(default_factory=list)  # original's score less the candidate's
    labels_of_both: int = 0
    inputs: list[Batch] = field(default_factory=list)
    outputs: list[Batch] = field(default_factory=list)  # the candidate's
    invalid: int = 0  # observations that could not be used
    problem: str = ""  # of the last one
    memory_bytes: float | None = None  # the candidate's, the most that was told
    queue: float | None = None
    routed: bool = False  # whether a request came at all

    def add(self, seen: Observation, now: float, quiet: bool) -> None:
        """Count one observation; of latencies one in 50 ms is sampled, and only where ``quiet``."""
        model = self.candidate if seen.model == CANDIDATE else self.original
        if not seen.late_label:
            self._count(model, seen, now, quiet)
        if seen.score is not None:
            self._label(seen.model, seen.score, seen.score_of_other)
        if seen.agreed is not None:
            self.pairs += 1
            self.disagreements += not seen.agreed
            if seen.distance is not None and math.isfinite(seen.distance):
                self.distance += seen.distance
                self.distances += 1
        if seen.inputs and len(self.inputs) < MOST_SAMPLES:
            self.inputs.append(seen.inputs)
        if seen.outputs and seen.model == CANDIDATE and len(self.outputs) < MOST_SAMPLES:
            self.outputs.append(seen.outputs)

    def _count(self, model: ModelTally, seen: Observation, now: float, quiet: bool) -> None:
        if seen.shadow:
            model.shadows += 1
        else:
            model.answers += 1
        if seen.fault is not None:
            model.faults[seen.fault] = model.faults.get(seen.fault, 0) + 1
        elif seen.latency_ms is not None:
            model.latency[bin_of(seen.latency_ms)] += 1
            slot = int(now / SLOT_S)
            room = len(model.quiet) < MOST_LATENCIES
            if quiet and room and not seen.shadow and slot != model.slot:
                model.slot = slot
                model.quiet.append(seen.latency_ms)

    def _label(self, model: str, score: float, other: float | None) -> None:
        """Both scores stand on the candidate's observation; one alone is for the charts."""
        ours = model == CANDIDATE
        self._scored(self.candidate if ours else self.original, score)
        if ours and other is not None:
            self._scored(self.original, other)
            self.labels_of_both += 1
            if len(self.drops) < MOST_LABELS:
                self.drops.append(other - score)

    def _scored(self, model: ModelTally, score: float) -> None:
        model.labels += 1
        model.score += score

    def refuse(self, problem: str) -> None:
        """Count an observation that cannot be used."""
        self.invalid += 1
        self.problem = problem

    def gauge(self, memory_bytes: float | None, queue: float | None) -> None:
        """Note what the candidate takes, and how many requests wait for it."""
        if memory_bytes is not None:
            self.memory_bytes = max(memory_bytes, self.memory_bytes or 0.0)
        if queue is not None:
            self.queue = max(queue, self.queue or 0.0)
