"""The guard for those with a server of their own: show it what was answered, and it decides."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.settings import check_arguments, described, require
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.observation import Observation, is_number
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import Event, Route, Stage

TICK_S = 1.0


@dataclass(frozen=True)
class Decision:
    """Where the rollout stands now.

    Args:
        stage: by name, such as "canary", "paused", "promoted" or "rolled back".
        weight: of 10,000 requests, how many the candidate is to answer.
        events: what has happened since the last decision.
        why: the reason of the last move.

    Example:
        >>> Decision("canary", 500, (), "every guard has evidence").share
        0.05
    """

    stage: str
    weight: int
    events: tuple[Event, ...]
    why: str

    @property
    def share(self) -> float:
        """The weight, as a share from 0 to 1."""
        return self.weight / 10_000

    @property
    def rolled_back(self) -> bool:
        """Whether the original alone is to serve, for good."""
        return self.stage == Stage.ROLLED_BACK


class Guard:
    """Guards a candidate beside the original, in a server that you have.

    Ask `route` where each request goes, or set your own balancer by the decision's weight; show
    every answer to `observe`. From `start` on, or within ``with guard:``, a thread of its own looks
    once a second, so that silence is noticed too; without it, `observe` looks. Where the state file
    cannot be read, the original alone serves, and `problem` says why.

    Args:
        bound: what validation measured: see `Bound.of`. The candidate counts as validated.
        policy: the numbers to go by; None takes the defaults.
        digest: which candidate this is; one that was rolled back is not tried again.
        state: the file that keeps the state over restarts; None keeps it in memory.
        alert: called with each event, from the thread that looks; what it raises is ignored.
        clock: of the wall, in seconds, for what is told.
        monotonic: in seconds, for everything else.

    Raises:
        UserError: an argument is not of its type.

    Example:
        >>> guard = Guard(Bound.of(disagreements=4, pairs=1000), digest="ab12")
        >>> decision = guard.observe(Observation("candidate", shadow=True, agreed=True))
        >>> decision.stage, decision.weight
        ('shadow', 0)
        >>> for _ in range(5):
        ...     decision = guard.observe(Observation("candidate", shadow=True, fault="crash"))
        >>> decision.rolled_back, decision.why
        (True, '3 hard faults (crash) within 10 s')
    """

    def __init__(
        self,
        bound: Bound,
        policy: Policy | None = None,
        digest: str = "candidate",
        state: str | Path | None = None,
        alert: Callable[[Event], None] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ):
        check_arguments(
            bound=(bound, Bound),
            policy=(policy, Policy | None),
            digest=(digest, str),
            state=(state, str | Path | None),
        )
        require("digest", digest, bool(digest), "a text")
        require("alert", alert, alert is None or callable(alert), "a function")
        for name, given in (("clock", clock), ("monotonic", monotonic)):
            require(name, given, callable(given), "a function that gives seconds")
        self._monotonic, self._alert = monotonic, alert
        self._journal: Journal | None = None
        self.problem = ""  # why the original alone serves
        policy = policy or Policy()
        try:
            self._journal = None if state is None else Journal.open(state)
            self.rollout = Rollout(policy, bound, self._journal, digest, clock, monotonic)
            self._start()
        except UserError as error:
            self.problem = str(error)
            if self._journal is not None:
                self._journal.close()
            self.rollout = Rollout.alone(self.problem, policy, digest)
        self._last, self._stage = monotonic(), self.rollout.stage
        self._looks = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ends = threading.Event()
        self._closed = False

    def _start(self) -> None:
        if self.rollout.stage is Stage.IDLE:
            self.rollout.begin()
        if self.rollout.stage is Stage.VALIDATE:
            self.rollout.validated(True, "the bound was given")

    def route(self, key: bytes | str) -> Route:
        """Where the request with this key goes, and whether the other model answers beside it.

        Raises:
            UserError: the key is neither bytes nor a text.
        """
        if isinstance(key, str):  # of a client, who may have put anything into it
            key = key.encode(errors="surrogatepass")
        if not isinstance(key, bytes):
            raise UserError(f"key: expected bytes or a text, got {described(key)}.")
        return self.rollout.route(key)

    def observe(self, observation: Observation) -> Decision:
        """Take in one answer. Hard faults roll back here, at once.

        Raises:
            UserError: it is no Observation, or a number in it is out of its range. What a model
                really gave, such as NaN, is a fault of its own: ``fault="nan"``.
        """
        if not isinstance(observation, Observation):
            check_arguments(observation=(observation, Observation))
        problem = observation.problem()
        if problem:
            raise UserError(f"{problem}.")
        self.rollout.observe(observation)
        due = self._thread is None and abs(self._monotonic() - self._last) >= TICK_S
        moved = self.rollout.stage is not self._stage  # at once, by hard faults
        return self.look() if due or moved else self._decision(())

    def look(self) -> Decision:
        """Judge what came in. To be called about once a second where no `with` block does it."""
        with self._looks:
            self._last = self._monotonic()
            events = tuple(self.rollout.tick())
            self._stage = self.rollout.stage
        for event in events:
            if self._alert is not None:
                with contextlib.suppress(Exception):  # of the user's code; decisions go on
                    self._alert(event)
        return self._decision(events)

    def _decision(self, events: tuple[Event, ...]) -> Decision:
        status = self.rollout.position
        why = self.problem or status.why
        return Decision(str(status.stage), self.rollout.weight, events, why)

    def gauge(self, memory_bytes: float | None = None, queue: float | None = None) -> None:
        """Tell what the candidate takes, and how many requests wait for it.

        Raises:
            UserError: one is no finite number from 0 up.
        """
        for name, value in (("memory_bytes", memory_bytes), ("queue", queue)):
            fits = value is None or (is_number(value) and 0 <= value < math.inf)
            require(name, value, fits, "a number from 0 up")
        self.rollout.gauge(memory_bytes, queue)

    def status(self) -> dict[str, Any]:
        """Everything, as plain JSON: each guard, its evidence, and what is missing to go on."""
        return self.rollout.status()

    def promote(self, reason: str, by: str = "hand") -> None:
        """By hand to all of the traffic.

        Raises:
            UserError: no reason, or not from here.
        """
        self.rollout.promote(reason, by)

    def pause(self, reason: str, by: str = "hand") -> None:
        """Stay at this weight.

        Raises:
            UserError: no reason, or not from here.
        """
        self.rollout.pause(reason, by)

    def resume(self, reason: str, by: str = "hand") -> None:
        """Back to where the pause came from.

        Raises:
            UserError: no reason, or it is not paused.
        """
        self.rollout.resume(reason, by)

    def abort(self, reason: str = "by hand", by: str = "hand") -> None:
        """Roll back at once, from anywhere."""
        self.rollout.abort(reason, by)

    def start(self) -> None:
        """Look once a second from now on, from a thread of its own, until `close`."""
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._run, name="guard", daemon=True)
            self._thread.start()

    def __enter__(self) -> Guard:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._ends.wait(TICK_S):
            self.look()

    def close(self) -> None:
        """Look for a last time, and release the state file; once closed it stays as it is."""
        if self._closed:
            return
        self._closed = True
        self._ends.set()
        if self._thread is not None:
            self._thread.join(10.0)
            self._thread = None
        self.look()
        self.rollout.keep()
        if self._journal is not None:
            self._journal.close()
