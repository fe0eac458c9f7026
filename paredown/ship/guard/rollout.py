"""One candidate's way from the first shadow to all of the traffic, or back."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from paredown.core.errors import UserError
from paredown.core.settings import require
from paredown.ship.guard import moves
from paredown.ship.guard.guards import Faults
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.observation import CANDIDATE, ORIGINAL, Observation
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.profile import Profile
from paredown.ship.guard.stages import WHOLE, Event, Position, Route, Stage
from paredown.ship.guard.tally import Tally

SALT = b"paredown"  # never another: who was routed to the candidate stays there as weights rise
KEPT = 500  # events that are held for the page
GOLDEN = 0.6180339887498949  # multiples of it, less their whole part, are spread evenly


@dataclass(frozen=True)
class Bound:
    """What validation saw.

    Args:
        rate: of the pairs, how many disagreed.
        upper: the upper bound of that rate; live traffic is held against it.
        profile: of inputs and outputs, for drift; None asks for none.

    Raises:
        UserError: a rate is none, or the bound lies below it.

    Example:
        >>> Bound(rate=0.01, upper=0.02).upper
        0.02
    """

    rate: float
    upper: float
    profile: Profile | None = None

    def __post_init__(self) -> None:
        require("rate", self.rate, 0 <= self.rate <= 1, "a share from 0 to 1")
        fits = 0 < self.upper < 1 and self.rate <= self.upper
        require("upper", self.upper, fits, "a share above 0, below 1 and at least the rate")


class Rollout:
    """Routes requests, looks at what both models answered, and decides whether to go on.

    `route` and `observe` may be called from any thread, and touch no disk. `tick` is to be called
    about once a second, from any thread; it, and the moves by hand, write to the journal: before
    a weight is raised, and after it was lowered.

    Args:
        policy: every number that it goes by.
        bound: what validation saw.
        journal: where the state is kept; None keeps it in memory.
        digest: of the candidate, of which a roll back is latched.
        clock: of the wall, for what is told; nothing is decided by it.
        monotonic: in seconds, for everything else. Steps of more than a window count as one.

    Example:
        >>> rollout = Rollout(Policy(), Bound(0.01, 0.02), None, "ab12")
        >>> rollout.begin()
        >>> rollout.validated(True, "by hand")
        >>> rollout.stage, rollout.route(b"a request").model
        (<Stage.SHADOW: 'shadow'>, 'original')
        >>> rollout.abort("enough", by="me")
        >>> rollout.stage
        <Stage.ROLLED_BACK: 'rolled back'>
    """

    def __init__(
        self,
        policy: Policy,
        bound: Bound,
        journal: Journal | None,
        digest: str,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        self.policy, self.bound, self.digest = policy, bound, digest
        self._journal, self._clock, self._monotonic = journal, clock, monotonic
        self._state = threading.Lock()  # held for microseconds, never over the disk
        self._turn = threading.Lock()  # of those who move and write; held over the disk
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._told: list[Event] = []  # since the last tick
        self._unsaved: list[Event] = []
        self._tally, self._faults = Tally(), Faults(policy)
        self._requests = itertools.count(1)
        self._dwell_s, self._last = 0.0, monotonic()
        self._blocked = ""
        self._move(_recovered(journal, digest))
        if journal is not None:
            self._events.extend(journal.events()[-KEPT:])

    @staticmethod
    def alone(why: str, policy: Policy, digest: str) -> Rollout:
        """A rollout that cannot begin: the original alone serves, as where the state is unreadable.

        Example:
            >>> rollout = Rollout.alone("rollout.db: is damaged", Policy(), "ab12")
            >>> rollout.route(b"a request")
            Route(model='original', shadow=False)
        """
        made = Rollout(policy, Bound(0.0, 0.5), None, digest)
        made._blocked = why
        return made

    # --- while serving ---

    def route(self, key: bytes) -> Route:
        """Where a request goes, by a hash of its key: the same key stays with the candidate as
        weights rise."""
        weight, share = self._ways
        model = CANDIDATE if weight and _bucket(key) < weight else ORIGINAL
        return Route(model, bool(share) and next(self._requests) * GOLDEN % 1 < share)

    def observe(self, observation: Observation) -> None:
        """Take in one answer; hard faults roll back here, at once."""
        now = self._monotonic()
        with self._state:
            self._tally.add(observation, now, quiet=True)
            if not self._position.judged:
                return
            action = self._faults.seen(observation.model, observation.fault, now)
            if action is not None:
                self._act(*action)

    def tick(self) -> list[Event]:
        """Judge what came in, and go on, pause or roll back; what has happened since the last."""
        with self._turn:
            now = self._monotonic()
            with self._state:
                self._tally = Tally()
                self._dwell_s += min(max(0.0, now - self._last), self.policy.window_s)
                self._last = now
            self._flush()
            with self._state:
                told, self._told = self._told, []
        return told

    # --- by hand ---

    def begin(self) -> None:
        """Start with a new candidate, which is now validated.

        Raises:
            UserError: a candidate is on its way, or this one was rolled back.
        """
        require("begin", self._blocked, not self._blocked, "a readable state")
        self._raise("begin", moves.began, "guard")

    def validated(self, passed: bool, why: str) -> None:
        """Say how validation ended.

        Raises:
            UserError: nothing is being validated, or the state cannot be written.
        """
        self._raise("validated", lambda at: moves.validated(at, passed, why, self.policy), "guard")

    def promote(self, reason: str, by: str) -> None:
        """By hand to all of the traffic, past what is missing. It stays guarded.

        Raises:
            UserError: it is not validated, or rolled back; no reason; the state cannot be written.
        """
        self._raise("promote", lambda at: moves.promoted(at, reason), by)

    def pause(self, reason: str, by: str) -> None:
        """Stay at this weight until `resume`.

        Raises:
            UserError: it is paused or rolled back, or no reason is given.
        """
        with self._state:
            self._act("pause", reason, by, "hand")
        self.flush()

    def resume(self, reason: str, by: str) -> None:
        """Back to where the pause came from.

        Raises:
            UserError: it is not paused; no reason; the state cannot be written.
        """
        self._raise("resume", lambda at: moves.resumed(at, reason), by)

    def abort(self, reason: str = "by hand", by: str = "hand") -> None:
        """Roll back at once, from anywhere; it needs no disk and is never refused."""
        with self._state:
            self._act("roll back", reason, by)
        self.flush()

    # --- to look at ---

    @property
    def stage(self) -> Stage:
        """Where it stands."""
        return self._position.stage

    @property
    def weight(self) -> int:
        """Of 10,000 requests, how many the candidate answers."""
        return self._ways[0]

    def status(self) -> dict[str, Any]:
        """Everything for the page, as plain JSON."""
        with self._state:
            return {
                "stage": str(self._position.stage),
                "position": self._position.to_json(),
                "weight": self.weight,
                "digest": self.digest,
                "blocked": self._blocked,
                "guards": [],
                "windows": [],
                "drift": {},
                "events": [asdict(each) for each in self._events],
            }

    def flush(self) -> None:
        """Write what is not on the disk yet; says nothing where the disk fails."""
        with self._turn:
            self._flush()

    # --- inside ---

    def _raise(self, kind: str, move: Callable[[Position], Position], by: str) -> None:
        """Commit, then move: of what raises a weight, or begins something."""
        with self._turn:
            self._flush()
            before = self._position
            after = move(before)
            event = self._event(kind, after, by)
            if self._journal is not None:
                self._journal.append(event, self._snapshot(after))
            with self._state:
                if self._position is before:  # else it was rolled back meanwhile, and that wins
                    self._move(after)
                    self._tell(event)

    def _act(self, kind: str, reason: str, by: str = "guard", cause: str = "both fail") -> None:
        """Lower, or stay, at once; the journal is written later. The state's lock is held."""
        if self._position.stage is Stage.ROLLED_BACK:
            return
        if kind == "roll back":
            after = moves.rolled_back(reason)
        elif by == "guard" and self._position.stage is Stage.PAUSED:
            return
        else:
            after = moves.paused(self._position, reason, cause)
        self._move(after)
        event = self._event(kind, after, by)
        self._tell(event)
        self._unsaved.append(event)

    def _move(self, after: Position) -> None:
        self._position = after
        share = self.policy.shadow_share if after.judged else 0.0
        self._ways = (moves.weight_at(after, self.policy), share)
        self._dwell_s = 0.0

    def _event(self, kind: str, after: Position, by: str) -> Event:
        weight = moves.weight_at(after, self.policy)
        return Event(self._clock(), kind, after.stage, weight, after.why, by, self.digest)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._told.append(event)

    def _flush(self) -> None:
        while self._unsaved and self._journal is not None:
            try:
                self._journal.append(self._unsaved[0], self._snapshot(self._position))
            except UserError:
                return
            self._unsaved.pop(0)
        self._unsaved.clear()

    def _snapshot(self, position: Position) -> dict[str, Any]:
        return {"digest": self.digest, "position": position.to_json()}


def _bucket(key: bytes) -> int:
    """Of 10,000, the one that a key falls into, at any time and on any machine."""
    digest = hashlib.blake2b(key, digest_size=8, key=SALT).digest()
    return int.from_bytes(digest, "little") % WHOLE


def _recovered(journal: Journal | None, digest: str) -> Position:
    """Where this candidate stood when the journal was last written; a new one begins anew."""
    if journal is None:
        return Position()
    why = journal.latched(digest)
    if why is not None:
        return moves.rolled_back(why)
    kept = journal.snapshot()
    return Position.from_json(kept["position"]) if kept and kept["digest"] == digest else Position()
