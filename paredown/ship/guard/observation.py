"""What is seen of one answered request, or of one pair of answers to the same request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

ORIGINAL, CANDIDATE = "original", "candidate"
MODELS = (ORIGINAL, CANDIDATE)
FAULTS = ("crash", "nan", "shape", "deadline", "error")
HARD = frozenset(FAULTS) - {"error"}  # three within ten seconds roll back; an error is a rate


@dataclass(frozen=True)
class Observation:
    """One answered request as one of the models answered it, or one shadowed pair.

    A fault is the model's, never the client's: a request that is refused as malformed is not
    observed. Of a pair, ``agreed`` and ``distance`` stand on the candidate's observation, and so
    do both scores; one with a score and nothing else is a label that came late.

    Args:
        model: "original" or "candidate", whose answer this measures.
        latency_ms: of the model alone, with its queue.
        fault: None, or one of `FAULTS`.
        shadow: the answer was made beside the one that the client got.
        agreed: whether the pair gave the same answer; None where there was no pair.
        distance: relative difference of the pair's outputs, for the page.
        score: from a label that came later, this model's score on that example, from 0 to 1.
        score_of_other: the other model's score on the same example, where known.
        inputs: name -> batch, sampled, for the drift of inputs.
        outputs: name -> batch, sampled, for the drift of outputs.

    Example:
        >>> Observation("candidate", latency_ms=3.5, agreed=True).problem()
        ''
        >>> Observation("candidate", fault="boom").problem()
        "fault: expected one of crash, nan, shape, deadline, error, got 'boom'"
    """

    model: str
    latency_ms: float | None = None
    fault: str | None = None
    shadow: bool = False
    agreed: bool | None = None
    distance: float | None = None
    score: float | None = None
    score_of_other: float | None = None
    inputs: Mapping[str, np.ndarray] | None = None
    outputs: Mapping[str, np.ndarray] | None = None

    @property
    def late_label(self) -> bool:
        """Whether it is a label alone, for an answer that was observed before."""
        answered = (self.latency_ms, self.fault, self.agreed)
        return self.score is not None and all(each is None for each in answered)

    def problem(self) -> str:
        """What is wrong with it, or nothing: one that is wrong is counted, and not judged by."""
        if self.model not in MODELS:
            return f"model: expected one of {', '.join(MODELS)}, got {self.model!r}"
        if self.fault is not None and self.fault not in FAULTS:
            return f"fault: expected one of {', '.join(FAULTS)}, got {self.fault!r}"
        if self.latency_ms is not None and not 0 <= self.latency_ms < math.inf:
            return f"latency_ms: expected a number from 0 up, got {self.latency_ms!r}"
        for name in ("score", "score_of_other"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                return f"{name}: expected a number from 0 to 1, got {value!r}"
        if self.distance is not None and not math.isfinite(self.distance):
            return f"distance: expected a number, got {self.distance!r}"
        return ""
