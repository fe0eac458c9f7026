"""What is seen of one answered request, or of one pair of answers to the same request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paredown.core.errors import UserError
from paredown.core.settings import described, require

ORIGINAL, CANDIDATE = "original", "candidate"
MODELS = (ORIGINAL, CANDIDATE)
FAULTS = ("crash", "nan", "shape", "deadline", "error")
_NUMBERS, _ARRAYS = ("latency_ms", "distance", "score", "score_of_other"), ("inputs", "outputs")
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
        distance: relative difference of the pair's outputs, for the page; the pair counts without
            it where it is NaN or infinite.
        score: from a label that came later, this model's score on that example, from 0 to 1.
        score_of_other: the other model's score on the same example, where known.
        inputs: name -> batch, sampled, for the drift of inputs.
        outputs: name -> batch, sampled, for the drift of outputs.

    Raises:
        UserError: a value is of the wrong kind, or a name is unknown. A number out of its range,
            which a clock or a scorer may have given, is what `problem` tells.

    Example:
        >>> Observation("candidate", latency_ms=3.5, agreed=True).problem()
        ''
        >>> Observation("candidate", latency_ms=-1.0).problem()
        'latency_ms: expected a number from 0 up, got -1.0'
        >>> Observation("candidate", fault="Crash")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: fault: expected one of crash, nan, shape, deadline, error, \
got 'Crash'.
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

    def __post_init__(self) -> None:
        # It is made a thousand times a second: plain comparisons, and words only where one fails.
        if not isinstance(self.model, str) or self.model not in MODELS:
            require("model", self.model, False, f"one of {', '.join(MODELS)}")
        if self.fault is not None and not _is_fault(self.fault):
            require("fault", self.fault, False, f"one of {', '.join(FAULTS)}")
        if self.agreed is not None and not _is_flag(self.agreed):
            require("agreed", self.agreed, False, "True, False or None")
        if not _is_flag(self.shadow):
            require("shadow", self.shadow, False, "True or False")
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None and not is_number(value):
                require(name, value, False, "a number or None")
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is not None:
                _check_arrays(name, value)

    @property
    def late_label(self) -> bool:
        """Whether it is a label alone, for an answer that was observed before."""
        answered = (self.latency_ms, self.fault, self.agreed)
        return self.score is not None and all(each is None for each in answered)

    def problem(self) -> str:
        """What is wrong with it, or nothing: one that is wrong is counted, and not judged by."""
        if self.latency_ms is not None and not 0 <= self.latency_ms < math.inf:
            return f"latency_ms: expected a number from 0 up, got {self.latency_ms!r}"
        for name in ("score", "score_of_other"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                return f"{name}: expected a number from 0 to 1, got {value!r}"
        return ""


def _is_flag(value: object) -> bool:
    return value is True or value is False or isinstance(value, np.bool_)


def _is_fault(value: object) -> bool:
    return isinstance(value, str) and value in FAULTS


def is_number(value: object) -> bool:
    """Whether it is a number, of Python or of NumPy; True and False are none.

    Example:
        >>> is_number(np.float32(1)), is_number(True)
        (True, False)
    """
    if isinstance(value, int):  # one that no float holds would overflow where it is counted
        return not isinstance(value, bool) and abs(value) < 2**1000
    return isinstance(value, (float, np.integer, np.floating))


def _check_arrays(name: str, value: object) -> None:
    fits = isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(each, np.ndarray) for key, each in value.items()
    )
    if not fits:
        expected = 'arrays by name, such as {"x": x}'
        raise UserError(f"{name}: expected {expected}, got {described(value)}.")
