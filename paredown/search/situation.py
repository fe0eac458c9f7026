"""What a plan is made for, and what follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.core.units import Limit
from paredown.graph.model import Model
from paredown.graph.quantized.regions import INTEGER_KINDS, ROUNDED_KINDS
from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.targets.runtimes import Runtime, runtime

INT8_TIME = 0.5  # of float, as found on convolutional nets: more often less than more


@dataclass(frozen=True)
class Share:
    """What may stay of a model, ``left``, of its ``amount``: "parameters" or "macs"."""

    left: float
    amount: str

    @property
    def named(self) -> str:
        return "multiply-adds" if self.amount == "macs" else self.amount


@dataclass(frozen=True)
class Situation:
    """All that an offer may look at; ``seed`` is that of the training.

    What several offers ask for is worked out once, when it is first asked for.
    """

    model: Model
    task: Task
    goals: Goals
    baseline: Measurement
    target: Target
    seed: int

    @property
    def trains(self) -> bool:
        return self.task.train is not None

    @property
    def calibrates(self) -> bool:
        return not self.task.missing({"calibration"})

    @cached_property
    def runtime(self) -> Runtime:
        return runtime(self.target.runtime)

    @cached_property
    def quantizable(self) -> bool:
        """Whether it has layers whose weights can become integers."""
        return any(site.kind in ROUNDED_KINDS for site in sites(self.model.graph))

    @cached_property
    def factorable(self) -> bool:
        """Whether it has layers that factors can stand for."""
        return any(site.kind in INTEGER_KINDS for site in sites(self.model.graph))

    @property
    def integers(self) -> tuple[int, int] | None:
        """What 8-bit integers add to the file for each channel and for each layer, in bytes; None
        where the model cannot get any that make it smaller."""
        return self.runtime.INT8_BYTES if self.calibrates and self.quantizable else None

    @cached_property
    def share(self) -> Share:
        """The share that may stay for the goals: of the parameters where the size asks for the
        most, else of the multiply-adds.

        8-bit integers are counted in where there are any; the share is 1 and more where they should
        do by themselves.
        """
        size = time = math.inf
        if isinstance(self.goals.size, Limit):
            whole = self.baseline.size_bytes
            integers = self.integers
            expected = expected_integer_bytes(self.model, whole, integers) if integers else whole
            size = self.goals.size.absolute(whole) / expected
        for goal in ("latency", "energy", "throughput"):
            limit, value = getattr(self.goals, goal), self.baseline.quantity(goal)
            if limit is not None and value:
                asked = limit.absolute(value) / value
                left = 1 / asked if goal == "throughput" else asked
                time = min(time, left / INT8_TIME if self.integers else left)
        return Share(size, "parameters") if size <= time else Share(time, "macs")


def expected_integer_bytes(
    model: Model, size_bytes: int, integers: tuple[int, int], bits: int = 8
) -> float:
    """The file's size with so many bits for each quantizable weight, 8 for each of a table, and
    what the integers bring along for each channel and each layer, in bytes."""
    layers = {s.weight: s for s in sites(model.graph) if s.kind in (*ROUNDED_KINDS, "embedding")}
    weights = {id(tensor_of(model.graph, name)): site for name, site in layers.items()}
    saved = 0.0
    for site in weights.values():
        weight, taken = tensor_of(model.graph, site.weight), 8 if site.kind == "embedding" else bits
        saved += weight.numel() * (weight.element_size() - taken / 8)
    channels = sum(tensor_of(model.graph, n).shape[s.axis] for n, s in layers.items())
    added = integers[0] * channels + integers[1] * len(layers)
    return float(max(size_bytes - saved, 0) + added)
