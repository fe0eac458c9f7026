"""The stages of a rollout, what moves between them, and where a request goes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

WHOLE = 10_000  # weights are of this many


class Stage(StrEnum):
    """Where a rollout stands.

    Example:
        >>> Stage.CANARY, str(Stage.ROLLED_BACK)
        (<Stage.CANARY: 'canary'>, 'rolled back')
    """

    IDLE = "idle"
    VALIDATE = "validate"
    SHADOW = "shadow"
    CANARY = "canary"
    SOAK = "soak"
    PROMOTED = "promoted"
    PAUSED = "paused"
    ROLLED_BACK = "rolled back"


# Those in which the candidate sees traffic, and is judged.
LIVE = frozenset({Stage.SHADOW, Stage.CANARY, Stage.SOAK, Stage.PROMOTED})


@dataclass(frozen=True)
class Position:
    """A stage with what belongs to it; this is what a restart goes on from.

    Args:
        stage: where the rollout stands.
        step: of the canary's steps, counted from 0.
        paused_from: the stage that a pause returns to.
        why: the reason of the last move.
        cause: of a pause: "hand", "drift", "no data", "both fail", "journal".

    Example:
        >>> Position(Stage.PAUSED, 1, Stage.CANARY).where
        <Stage.CANARY: 'canary'>
    """

    stage: Stage = Stage.IDLE
    step: int = 0
    paused_from: Stage | None = None
    why: str = ""
    cause: str = ""

    @property
    def where(self) -> Stage:
        """The stage, or of a pause the one that it returns to."""
        return self.paused_from if self.paused_from is not None else self.stage

    @property
    def judged(self) -> bool:
        """Whether the candidate sees traffic, and is judged."""
        return self.where in LIVE

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @staticmethod
    def from_json(told: dict[str, Any]) -> Position:
        """What `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is not.
        """
        paused = told["paused_from"]
        return Position(
            Stage(told["stage"]),
            int(told["step"]),
            None if paused is None else Stage(paused),
            str(told["why"]),
            str(told["cause"]),
        )


@dataclass(frozen=True)
class Event:
    """One move of a rollout, or an attempt that failed.

    Args:
        time_s: by the wall clock, for reading alone; no decision looks at it.
        kind: "begin", "validated", "advance", "promote", "pause", "resume", "roll back", "warn".
        stage: after the event.
        weight: of 10,000, after the event.
        reason: in words.
        by: "guard", or who did it by hand.
        digest: of the candidate.

    Example:
        >>> Event(0.0, "begin", Stage.VALIDATE, 0, "a new candidate", "guard", "ab").kind
        'begin'
    """

    time_s: float
    kind: str
    stage: Stage
    weight: int
    reason: str
    by: str
    digest: str


@dataclass(frozen=True)
class Route:
    """Where one request goes.

    Args:
        model: "original" or "candidate": which one answers the client.
        shadow: whether the other should answer too, beside it.

    Example:
        >>> Route("original", shadow=True).model
        'original'
    """

    model: str
    shadow: bool
