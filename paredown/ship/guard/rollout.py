"""One candidate's way from the first shadow to all of the traffic, or back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from paredown.core.errors import UserError
from paredown.ship.guard import moves
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.observation import Observation
from paredown.ship.guard.panel import Panel
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.router import Router
from paredown.ship.guard.stages import Event, Position, Route, Stage
from paredown.ship.guard.tally import Tally
from paredown.ship.guard.windows import Windows

ROUNDING_S = 1e-6  # seconds that ticks lose when they are added up
PATIENCE_S = 0.1  # with a tick that writes, before the status is told as it was
KEPT = 500  # events that are held for the page


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
        self._tally, self._panel = Tally(), Panel(policy, bound.upper, bound.profile)
        self._windows = Windows(clock())
        self._router = Router(policy, monotonic())
        self._invalid, self._problem = 0, ""
        self._dwell_s, self._last = 0.0, monotonic()
        self._blocked = ""
        self._seen: dict[str, Any] = {"guards": [], "missing": [], "drift": {}}
        self._move(_recovered(journal, digest, self._panel))
        if journal is not None:
            self._events.extend(journal.events()[-KEPT:])
        self._look()

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
        """Where a request goes, by a hash of its key: who was routed to the candidate stays there
        as weights rise. It takes no lock."""
        self._tally.routed = True
        return self._router.route(key, self._monotonic())

    def observe(self, observation: Observation) -> None:
        """Take in one answer; hard faults roll back here, at once. What makes no sense is counted
        as invalid, and not judged by."""
        now, problem = self._monotonic(), observation.problem()
        with self._state:
            if problem:
                self._tally.refuse(problem)
                return
            self._tally.add(observation, now, self._router.quiet(now))
            if self._position.judged and not observation.late_label:
                seen = self._panel.faults.seen(observation.model, observation.fault, now)
                if seen is not None:
                    self._act(*seen)

    def gauge(self, memory_bytes: float | None = None, queue: float | None = None) -> None:
        """Tell what the candidate's worker takes, and how many requests wait for it."""
        with self._state:
            self._tally.gauge(memory_bytes, queue)

    def tick(self) -> list[Event]:
        """Judge what came in, and go on, pause or roll back; gives what happened since the last.

        Raises nothing for a disk that fails: the rollout then pauses, as no weight may be raised.
        """
        with self._turn:
            now = self._monotonic()
            with self._state:
                tally, self._tally = self._tally, Tally()
                position = self._position
                passed = min(max(0.0, now - self._last), self.policy.window_s)
                self._dwell_s += passed
                self._last = now
            self._take(tally, position, passed, now)
            if position.judged:
                self._decide(position)
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
        if self._blocked:
            raise UserError(f"begin: the original alone serves: {self._blocked}")
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
            UserError: it is paused or rolled back, not validated yet, or no reason is given.
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
            self._act("roll back", reason or "by hand", by)
        self.flush()

    # --- to look at ---

    @property
    def stage(self) -> Stage:
        """Where it stands."""
        return self._position.stage

    @property
    def position(self) -> Position:
        """Where it stands, with the reason of the last move, and what a pause returns to."""
        return self._position

    @property
    def weight(self) -> int:
        """Of 10,000 requests, how many the candidate answers."""
        return self._router.weight

    def status(self) -> dict[str, Any]:
        """Everything for the page, as plain JSON; where a tick waits for the disk, what the guards
        said before it."""
        self._look()
        return {
            "stage": str(self._position.stage),
            "position": self._position.to_json(),
            "weight": self.weight,
            "digest": self.digest,
            "blocked": self._blocked,
            "dwell_s": self._dwell_s,
            "dwell_needed_s": self._dwell_needed(self._position),
            "guards": self._seen["guards"],
            "missing": self._seen["missing"],
            "windows": list(self._windows.records),
            "drift": self._seen["drift"],
            "invalid": self._invalid,
            "problem": self._problem,
            "journal": "" if self._journal is None else self._journal.broken,
            "events": [asdict(each) for each in list(self._events)],
        }

    def _look(self) -> None:
        """Ask the guards, if no tick is at them for longer than a moment."""
        if self._turn.acquire(timeout=PATIENCE_S):
            try:
                position = self._position
                self._seen = {
                    "guards": [asdict(each) for each in self._panel.findings(position.where)],
                    "missing": self._missing(position),
                    "drift": self._panel.drift(),
                }
            finally:
                self._turn.release()

    def flush(self) -> None:
        """Write what is not on the disk yet; says nothing where the disk fails, and does not wait
        for one that hangs."""
        if self._turn.acquire(timeout=1.0):
            try:
                self._flush()
            finally:
                self._turn.release()

    def keep(self) -> None:
        """Write what the tests have seen by now, as before the end; else it is once a window."""
        with self._turn:
            self._keep(self._position)

    # --- inside ---

    def _take(self, tally: Tally, position: Position, passed_s: float, now: float) -> None:
        """Give a tick's counts to the guards, and at its end a window's."""
        self._invalid += tally.invalid
        self._problem = tally.problem or self._problem
        self._windows.open.add(tally)
        self._windows.passed_s += passed_s
        if position.judged:
            self._panel.update(tally)
        if self._windows.passed_s < self.policy.window_s - ROUNDING_S:
            return
        ended = self._windows.close(str(position.stage), self.weight, self._clock())
        self._router.window(now)
        if position.judged:
            self._panel.window(ended, position.where)
            self._keep(position)

    def _decide(self, position: Position) -> None:
        """What the guards' findings lead to, if nobody has moved meanwhile."""
        findings = self._panel.findings(position.where)
        failed = [each for each in findings if each.state == "fail"]
        with self._state:
            if self._position is not position:
                return
            for finding in sorted(failed, key=lambda each: each.action != "roll back"):
                cause = "no data" if finding.name == "data" else "drift"
                self._act(finding.action, f"{finding.name}: {finding.says}", cause=cause)
                return
        if position.cause == "no data":
            if not self._panel.data.silent:
                self._go("resume", lambda at: moves.resumed(at, "data come in again"))
        elif position.stage is not Stage.PAUSED and position.stage is not Stage.PROMOTED:
            if not self._missing(position):
                why = f"every guard has evidence, after {self._dwell_s:,.0f} s"
                kind = "promote" if position.stage is Stage.SOAK else "advance"
                self._go(kind, lambda at: moves.advanced(at, self.policy, why))

    def _missing(self, position: Position) -> list[str]:
        """What stands between this position and the next."""
        if position.stage not in (Stage.SHADOW, Stage.CANARY, Stage.SOAK):
            return []
        found = [
            f"{each.name}: {each.says}"
            for each in self._panel.findings(position.where)
            if each.asked and each.state != "pass"
        ]
        left = self._dwell_needed(position) - self._dwell_s
        return [f"time: {left:,.0f} s to go", *found] if left > ROUNDING_S else found

    def _dwell_needed(self, position: Position) -> float:
        if position.where in (Stage.SHADOW, Stage.CANARY):
            return self.policy.dwell_s
        return self.policy.soak_s if position.where is Stage.SOAK else 0.0

    def _raise(self, kind: str, move: Callable[[Position], Position], by: str) -> None:
        """By hand: as `_commit`, in turn with the ticks."""
        with self._turn:
            self._flush()
            self._commit(kind, move, by)

    def _go(self, kind: str, move: Callable[[Position], Position]) -> None:
        """By the guard: where the disk fails it pauses, and no weight is raised."""
        try:
            self._commit(kind, move, "guard")
        except UserError as error:
            with self._state:
                self._act("pause", str(error), cause="journal")

    def _commit(self, kind: str, move: Callable[[Position], Position], by: str) -> None:
        """Write first, then move: of what raises a weight, or begins something."""
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
        stage = self._position.stage
        if stage is Stage.ROLLED_BACK and cause != "hand":
            return
        if kind == "roll back":
            after = moves.rolled_back(reason)
        elif stage is Stage.PAUSED and cause != "hand":
            return
        else:
            after = moves.paused(self._position, reason, cause)
        self._move(after)
        event = self._event(kind, after, by)
        self._tell(event)
        if self._journal is not None:
            self._unsaved.append(event)

    def _move(self, after: Position) -> None:
        self._position = after
        self._router.follow(after)
        if after.stage not in (Stage.PAUSED, Stage.ROLLED_BACK):  # these move in turn with ticks
            self._dwell_s = 0.0
            self._panel.entered()

    def _event(self, kind: str, after: Position, by: str) -> Event:
        weight = moves.weight_at(after, self.policy)
        return Event(self._clock(), kind, after.stage, weight, after.why, by, self.digest)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._told.append(event)

    def _flush(self) -> None:
        """Write the events that lowered or paused; they wait while the disk fails."""
        while self._unsaved and self._journal is not None:
            try:
                self._journal.append(self._unsaved[0], self._snapshot(self._position))
            except UserError:
                return
            self._unsaved.pop(0)

    def _keep(self, position: Position) -> None:
        """Write what the tests have seen, once a window."""
        if self._journal is not None:
            with contextlib.suppress(UserError):
                self._journal.save(self._snapshot(position))

    def _snapshot(self, position: Position) -> dict[str, Any]:
        panel = self._panel.to_json()
        return {"digest": self.digest, "position": position.to_json(), "guards": panel}


def _recovered(journal: Journal | None, digest: str, panel: Panel) -> Position:
    """Where this candidate stood when the journal was last written; a new one begins anew.

    What the tests had seen by then goes back into the panel.
    """
    if journal is None:
        return Position()
    why = journal.latched(digest)
    if why is not None:
        return moves.rolled_back(why)
    kept = journal.snapshot()
    if kept is None or kept.get("digest") != digest:
        return Position()
    try:
        panel.restore(kept["guards"])
        return Position.from_json(kept["position"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{journal.path}: its snapshot cannot be read ({error!r}), so the original alone "
            "serves. Restore the file, or remove it to begin anew."
        ) from error
