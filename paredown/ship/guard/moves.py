"""The state machine, pure: which moves are legal from where, and what comes of them."""

from __future__ import annotations

from dataclasses import replace

from paredown.core.errors import UserError
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.stages import WHOLE, Position, Stage

_PROMOTABLE = (Stage.SHADOW, Stage.CANARY, Stage.SOAK)


def weight_at(position: Position, policy: Policy) -> int:
    """Of 10,000 requests, how many the candidate answers; a pause keeps what there was.

    Example:
        >>> weight_at(Position(Stage.CANARY, step=1), Policy())
        500
    """
    if position.where is Stage.CANARY:
        return policy.steps[min(position.step, len(policy.steps) - 1)]
    return WHOLE if position.where in (Stage.SOAK, Stage.PROMOTED) else 0


def began(position: Position) -> Position:
    """A new candidate is to be validated.

    Raises:
        UserError: something runs already, or it was rolled back: that digest is not tried again.
    """
    if position.stage is Stage.ROLLED_BACK:
        raise UserError(
            f"begin: this candidate was rolled back ({position.why}), and is not tried again. Make "
            "another artifact."
        )
    if position.stage is not Stage.IDLE:
        raise UserError(f"begin: the rollout is at {position.stage} already.")
    return Position(Stage.VALIDATE, why="a new candidate")


def validated(position: Position, passed: bool, why: str, policy: Policy) -> Position:
    """Validation came to an end: on to the shadows, or to the end.

    Raises:
        UserError: nothing is being validated.
    """
    if position.stage is not Stage.VALIDATE:
        raise UserError(f"validated: the rollout is at {position.stage}, expected validate.")
    if not passed:
        return rolled_back(f"validation failed: {why}")
    return Position(Stage.SHADOW if policy.min_pairs else Stage.CANARY, why=why)


def advanced(position: Position, policy: Policy, why: str) -> Position:
    """One step further.

    Raises:
        ValueError: there is none, which is the caller's mistake.
    """
    if position.stage is Stage.SHADOW:
        return Position(Stage.CANARY, why=why)
    if position.stage is Stage.CANARY and position.step + 1 < len(policy.steps):
        return Position(Stage.CANARY, position.step + 1, why=why)
    if position.stage is Stage.CANARY:
        return Position(Stage.SOAK, why=why)
    if position.stage is Stage.SOAK:
        return Position(Stage.PROMOTED, why=why)
    raise ValueError(f"position: {position.stage} has no next step")


def promoted(position: Position, reason: str) -> Position:
    """By hand to the end, past what is missing.

    Raises:
        UserError: it is not validated, is promoted or was rolled back, or no reason is given.
    """
    _needs(reason, "promote")
    if position.where not in _PROMOTABLE:
        raise UserError(
            f"promote: the rollout is at {position.where}; a candidate can be promoted from "
            f"{', '.join(_PROMOTABLE)}."
        )
    return Position(Stage.PROMOTED, why=one_line(reason))


def paused(position: Position, reason: str, cause: str) -> Position:
    """Stay here: the weight remains, and nothing goes on.

    Raises:
        UserError: it is paused or was rolled back, or gets no request yet; no reason is given.
    """
    _needs(reason, "pause")
    if position.stage in (Stage.IDLE, Stage.VALIDATE):
        raise UserError(
            f"pause: the rollout is at {position.stage}, and the candidate gets no request yet. "
            "Pause when it is validated, or abort."
        )
    if position.stage in (Stage.PAUSED, Stage.ROLLED_BACK):
        raise UserError(f"pause: the rollout is {position.stage} already.")
    return replace(
        position,
        stage=Stage.PAUSED,
        paused_from=position.stage,
        why=one_line(reason),
        cause=cause,
    )


def resumed(position: Position, reason: str) -> Position:
    """Back to where the pause came from; its time and evidence start anew.

    Raises:
        UserError: it is not paused, or no reason is given.
    """
    _needs(reason, "resume")
    if position.paused_from is None:
        raise UserError(f"resume: the rollout is at {position.stage}, expected paused.")
    return Position(position.paused_from, position.step, why=one_line(reason))


def rolled_back(reason: str) -> Position:
    """The original alone, for good. From everywhere: an abort by hand always wins."""
    return Position(Stage.ROLLED_BACK, why=one_line(reason))


def one_line(text: str) -> str:
    """A text that stays one line in a log: what cannot be printed is escaped.

    Example:
        >>> len(one_line("slow" + chr(10) + "since noon").splitlines())
        1
    """
    told = str(text)
    if told.isprintable():
        return told
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in told
    )


def _needs(reason: str, move: str) -> None:
    if not (isinstance(reason, str) and reason.strip()):
        raise UserError(f"{move}: expected a reason, which is kept, got {reason!r}.")
