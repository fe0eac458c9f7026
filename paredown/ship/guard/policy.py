"""Every number that a rollout goes by, with its default, and the file that sets others."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.settings import check_count, check_fields, require
from paredown.ship.guard.stages import WHOLE


@dataclass(frozen=True)
class Policy:
    """Every number of a rollout. Times are in seconds of serving: a stop does not count.

    Args:
        steps: the canary's weights, of 10,000, each above the one before.
        dwell_s: the least time in the shadow stage and at each of the canary's steps.
        soak_s: the least time at the whole traffic before promotion.
        window_s: length of a window, in which data must come, and budgets must hold.
        min_canary: the least answers to clients by the candidate at each step.
        min_pairs: the least shadowed pairs at each stage; 0 asks for none, and leaves out the
            shadow stage.
        shadow_share: of the requests, how many are answered by both.
        shadow_more: the same while a drift has paused the rollout.
        top_up: below so many pairs in a window every request is shadowed.
        quiet_share: of each window, the last part without shadows, in which latency is compared.
        confidence: of the upper bounds that must lie inside the limits for the rollout to go on.
        margin: how far above its limit such an upper bound of a rate may lie.
        alpha_error: the chance, over the whole rollout, that the test of errors rolls back a
            candidate that keeps to its limit.
        alpha_disagreement: the same of the test of disagreement.
        alpha_latency: the same of the test of latency.
        alpha_score: the same of the test of scores.
        error_ratio: the candidate's faults may be so many times the original's,
        error_floor: plus this share of its answers.
        latency_ratio: the candidate's p99 may be so many times the original's.
        max_drop: so much may the mean score fall, where labels come.
        min_labels: the least paired labels at each stage; 0 asks for none, and judges what comes.
        memory_bytes: what the candidate may take; 0 is any.
        queue: how many requests may wait for it; 0 is any.
        over_budget: windows over budget in a row that roll back.
        psi: the population stability index above which a window has drifted.
        drifted: windows in a row that have drifted, and pause.
        min_drift: the least examples that an index is of.
        no_data_pause: windows in a row without data that pause.
        no_data_rollback: windows in a row without data that roll back.
        faults_in_row: faults of the candidate in a row that roll back at once.
        faults_in_burst: hard faults (all but errors) within `burst_s` that roll back at once.
        burst_s: the time of a burst; the original's share of faults is of about the same.

    Raises:
        UserError: a number is out of its range, or settings contradict each other.

    Example:
        >>> Policy(dwell_s=60).steps
        (100, 500, 2500, 5000)
        >>> Policy(psi=0)
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: psi: expected a number above 0, got 0.
    """

    steps: tuple[int, ...] = (100, 500, 2500, 5000)
    dwell_s: float = 300.0
    soak_s: float = 3600.0
    window_s: float = 60.0
    min_canary: int = 460
    min_pairs: int = 300
    shadow_share: float = 0.2
    shadow_more: float = 0.5
    top_up: int = 30
    quiet_share: float = 0.5
    confidence: float = 0.95
    margin: float = 0.02
    alpha_error: float = 0.001
    alpha_disagreement: float = 0.01
    alpha_latency: float = 0.001
    alpha_score: float = 0.01
    error_ratio: float = 2.0
    error_floor: float = 0.001
    latency_ratio: float = 1.10
    max_drop: float = 0.01
    min_labels: int = 0
    memory_bytes: int = 0
    queue: int = 0
    over_budget: int = 3
    psi: float = 0.2
    drifted: int = 2
    min_drift: int = 500
    no_data_pause: int = 3
    no_data_rollback: int = 10
    faults_in_row: int = 5
    faults_in_burst: int = 3
    burst_s: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        _check_steps(self.steps)
        for name in _COUNTS_FROM_0:
            check_count(name, getattr(self, name), least=0)
        for name in _COUNTS_FROM_1:
            check_count(name, getattr(self, name))
        for name, (low, high) in _BETWEEN.items():
            value = getattr(self, name)
            words = f"a number above {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            require(name, value, low < value < high, words)
        for name in ("shadow_share", "shadow_more", "margin", "max_drop"):
            value = getattr(self, name)
            require(name, value, 0 <= value <= 1, "a number from 0 to 1")
        require("quiet_share", self.quiet_share, 0 <= self.quiet_share < 1, "at least 0, below 1")
        require(
            "no_data_rollback",
            self.no_data_rollback,
            self.no_data_rollback > self.no_data_pause,
            f"more than no_data_pause ({self.no_data_pause})",
        )

    @staticmethod
    def from_toml(path: str | Path) -> Policy:
        """The policy of a file: names of this class, at the top, and nothing else.

        Raises:
            UserError: it cannot be read, is no TOML, or has an unknown name or a wrong value.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not a policy in TOML: it is not UTF-8 text.") from error
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not a policy in TOML: {error}.") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
        return Policy.of(table, str(path))

    @staticmethod
    def of(table: dict[str, Any], where: str = "policy") -> Policy:
        """The policy of a table of names and values.

        Raises:
            UserError: an unknown name or a wrong value.

        Example:
            >>> Policy.of({"dwell": 60})
            Traceback (most recent call last):
                ...
            paredown.core.errors.UserError: policy: has no setting 'dwell'; did you mean 'dwell_s'?
        """
        known = [field.name for field in dataclasses.fields(Policy)]
        for name in table:
            if name not in known:
                raise UserError(f"{where}: has no setting {name!r}; {_near(name, known)}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        try:
            return Policy(**values)  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


_COUNTS_FROM_0 = ("min_pairs", "min_labels", "memory_bytes", "queue", "top_up")
_COUNTS_FROM_1 = (
    "min_canary",
    "over_budget",
    "drifted",
    "min_drift",
    "no_data_pause",
    "no_data_rollback",
    "faults_in_row",
    "faults_in_burst",
)
_BETWEEN = {  # both ends excluded
    "dwell_s": (0, math.inf),
    "soak_s": (0, math.inf),
    "window_s": (0, math.inf),
    "burst_s": (0, math.inf),
    "psi": (0, math.inf),
    "confidence": (0.5, 1),
    "alpha_error": (0, 0.5),
    "alpha_disagreement": (0, 0.5),
    "alpha_latency": (0, 0.5),
    "alpha_score": (0, 0.5),
    "error_ratio": (0, math.inf),
    "error_floor": (0, 1),
    "latency_ratio": (0, math.inf),
}


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
    return f"did you mean {near!r}?"


def _check_steps(steps: Any) -> None:
    whole = isinstance(steps, tuple) and all(type(step) is int for step in steps)
    rising = whole and all(a < b for a, b in zip((0, *steps), (*steps, WHOLE), strict=True))
    require("steps", steps, bool(whole and steps and rising), "weights of 10,000 that rise")
