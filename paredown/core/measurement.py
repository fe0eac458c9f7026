"""What is measured of an exported file, and of two beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Measurement:
    """What was measured of one exported file, and where.

    ``score`` is the mean over ``examples`` examples of ``split`` with its interval; sizes and
    memory are bytes, latencies milliseconds per inference at the deployed batch, throughput
    examples per second, energy millijoules per inference. What the task does before and behind the
    model, where it does something, is the median of as many examples; end to end is the sum of the
    three medians.

    Memory is the peak of the process; ``memory_floor_bytes`` is what the same process takes with a
    model of one op, and ``memory_model_bytes`` what the model adds to that.
    """

    size_bytes: int
    score: float | None = None
    score_low: float | None = None
    score_high: float | None = None
    score_in_points: bool = True
    examples: int = 0
    split: str = ""
    latency_ms_p50: float | None = None
    latency_ms_p90: float | None = None
    latency_ms_p99: float | None = None
    latency_samples: int = 0
    preprocess_ms: float | None = None
    postprocess_ms: float | None = None
    end_to_end_ms: float | None = None
    throughput_per_s: float | None = None
    memory_bytes: int | None = None
    memory_floor_bytes: int | None = None
    memory_model_bytes: int | None = None
    energy_mj: float | None = None
    energy_source: Literal["measured", "estimated", "unavailable"] = "unavailable"
    where: dict[str, str] = field(default_factory=dict)

    def quantity(self, goal: str) -> float | None:
        """The figure a goal speaks of: size, latency (the median), memory, throughput, energy; and
        memory_model, the share of the memory that is the model's own."""
        names = {
            "size": "size_bytes",
            "latency": "latency_ms_p50",
            "memory": "memory_bytes",
            "memory_model": "memory_model_bytes",
            "throughput": "throughput_per_s",
            "energy": "energy_mj",
        }
        value: float | None = getattr(self, names[goal])
        return value


@dataclass(frozen=True)
class Census:
    """What a runtime makes of a file: the ops it runs and the file's bytes.

    ``unfused`` names the ops that could run on integers but stay in float between a dequantize
    and a quantize op; ``notes`` are plain sentences on what the rest does not tell.
    """

    integer_ops: dict[str, int]
    float_ops: dict[str, int]
    bytes_by_dtype: dict[str, int]
    unfused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A candidate beside the original, measured interleaved on the same examples."""

    score_difference: float | None = None  # candidate - original, paired
    score_difference_low: float | None = None
    score_difference_high: float | None = None
    speedup: float | None = None  # median latency of the original over the candidate's
    speedup_low: float | None = None
    speedup_high: float | None = None
    speedup_p90_low: float | None = None  # the same ratio of 90th percentiles
    speedup_p90_high: float | None = None
    speedup_p99_low: float | None = None
    speedup_p99_high: float | None = None
    latency_ms_low: float | None = None  # the candidate's median by itself
    latency_ms_high: float | None = None
    verdict: str = ""  # the claim about the score, one sentence
    speed: str = ""  # the claim about the latency, one sentence
    score_claim: str = ""  # "proven", "refuted", "not provable", or "" where no drop was bounded
