"""Observations as lines of JSON: what `paredown monitor` reads."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.ship.guard.observation import Observation, is_number

LONGEST = 8 * 2**20  # bytes of one line
_TEXT, _FLAG, _NUMBER, _ARRAYS = "a text", "true or false", "a number", "an object of arrays"
FIELDS = {  # what a line may hold, and of what kind; null is as if it were not there
    "model": _TEXT,
    "latency_ms": _NUMBER,
    "fault": _TEXT,
    "shadow": _FLAG,
    "agreed": _FLAG,
    "distance": _NUMBER,
    "score": _NUMBER,
    "score_of_other": _NUMBER,
    "inputs": _ARRAYS,
    "outputs": _ARRAYS,
}
GAUGES = ("memory_bytes", "queue")  # may stand beside an observation, or alone
TIME = "time_s"
LATEST_S = 2.0**52  # beyond it a clock of floats cannot go on by a second; nanoseconds are beyond


@dataclass(frozen=True)
class Line:
    """One line that was read.

    Args:
        observation: None where the line had gauges alone.
        gauges: "memory_bytes" and "queue", where the line has them.
        time_s: the line's own time, where it has one.

    Example:
        >>> line = read_line('{"model": "candidate", "latency_ms": 2, "queue": 4}')
        >>> line.observation.latency_ms, line.gauges
        (2, {'queue': 4})
    """

    observation: Observation | None
    gauges: dict[str, float]
    time_s: float | None


def read_line(text: str | bytes) -> Line:
    """The observation of one line of JSON.

    Raises:
        ValueError: it is no JSON object, has an unknown name, or a value of the wrong kind.

    Example:
        >>> read_line('{"model": "candidate", "latency": 2}')
        Traceback (most recent call last):
            ...
        ValueError: no line has 'latency'
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} bytes")
    try:
        told = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(told, dict):
        raise ValueError("expected an object")
    told = {name: value for name, value in told.items() if value is not None}
    numbers = {name: _number(name, told.pop(name)) for name in (*GAUGES, TIME) if name in told}
    time_s = numbers.pop(TIME, None)
    for name, value in told.items():
        if name not in FIELDS:
            raise ValueError(f"no line has {name!r}")
        _check(name, value)
    if "model" not in told:
        if told or not numbers:
            raise ValueError("it says no model")
        return Line(None, numbers, time_s)
    for name in ("inputs", "outputs"):
        if name in told:
            told[name] = {key: _array(key, each) for key, each in told[name].items()}
    try:
        observation = Observation(**told)
    except UserError as error:
        raise ValueError(str(error).removesuffix(".")) from error
    problem = observation.problem()
    if problem:
        raise ValueError(problem)
    return Line(observation, numbers, time_s)


def _check(name: str, value: Any) -> None:
    kind = FIELDS[name]
    fits = {
        _TEXT: isinstance(value, str),
        _FLAG: isinstance(value, bool),
        _NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
        _ARRAYS: isinstance(value, dict),
    }
    if not fits[kind]:
        raise ValueError(f"{name}: expected {kind}")


def _number(name: str, value: Any) -> float:
    if not is_number(value) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number")
    if name == TIME and abs(value) > LATEST_S:
        raise ValueError(f"{name}: expected seconds, got {value!r}")
    if name in GAUGES and value < 0:
        raise ValueError(f"{name}: expected a number from 0 up, got {value!r}")
    return value


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}: its rows differ in length") from error
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected an array of numbers")
    return array
