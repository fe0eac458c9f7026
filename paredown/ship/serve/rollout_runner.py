"""A rollout tied to a service: validated, begun, judged each second, kept on the disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paredown.core.errors import UserError
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.journal import Journal
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.rollout import Rollout
from paredown.ship.guard.stages import Stage
from paredown.ship.serve import validation
from paredown.ship.serve.examples import UNREADABLE, Examples
from paredown.ship.serve.service import Service
from paredown.ship.serve.validation import Known, Validation

TICK_S, LOOK_S = 1.0, 0.05
PAUSED_BY, ROLLED_BACK_BY = 3, 10  # looks in a row in which the guard itself failed
JOURNAL = "rollout.db"
UNKNOWN = Bound(0.0, 0.5)  # until validation has said more; no decision is made before


class Runner:
    """Moves a service's rollout.

    Args:
        folder: where its state is kept.
        digests: SHA-256 of the original and of the candidate.
        examples: what the candidate is validated on.
        known: what the run saw of the two files.
        say: told in words what happens.
    """

    def __init__(
        self,
        service: Service,
        policy: Policy,
        folder: Path,
        digests: tuple[str, str],
        examples: Examples,
        say: Callable[[str], None],
        known: Known | None = None,
    ) -> None:
        self.service, self.policy, self.folder = service, policy, folder
        self.digests, self.examples, self.say, self.known = digests, examples, say, known
        self._journal: Journal | None = None
        self._failed = 0
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Open the state; where it cannot be read the original serves alone, and that is said."""
        try:
            self._journal = Journal.open(self.folder / JOURNAL)
            found = Validation.kept(self.folder, *self.digests)
            self._use(found)
        except UserError as error:
            self.alone(str(error))

    def _use(self, found: Validation | None) -> None:
        bound = validation.bound_of(found, self.folder) if found and found.passed else UNKNOWN
        before = self.service.rollout
        self.service.rollout = Rollout(self.policy, bound, self._journal, self.digests[1])
        if before is not None and before.stage is Stage.ROLLED_BACK:  # maybe not on the disk yet
            self.service.rollout.abort(before.position.why)
        if found:
            self.service.pair.agreement = found.agreement

    def alone(self, why: str) -> None:
        """Let the original serve alone."""
        self.service.rollout = Rollout.alone(why, self.policy, self.digests[1])
        self.service.alone = why
        self.say(f"The original serves alone: {why}")

    def start(self) -> None:
        """Go on in the background."""
        self._running = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write what is not written yet, and let go of the state."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        if self._journal is not None:
            await asyncio.to_thread(self.service.rollout.flush)
            self._journal.close()

    # --- inside -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        if not self.service.alone:
            try:
                await self._begin()
            except UserError as error:
                self.alone(str(error))
            except Exception as error:  # whatever it is, the candidate has not been validated
                self.alone(f"validation failed: {type(error).__name__}: {error}")
        while True:
            await self._until_next()
            try:
                await self._tick()
                self._failed = 0
            except Exception as error:  # else nobody would judge any more, and nobody would know
                await self.unjudged(error)

    async def _until_next(self) -> None:
        """Wait for the next tick; a rollback that an answer brings about meanwhile is written as
        soon as it is seen, so that a kill right after does not undo it."""
        before = self.service.rollout.stage
        for _ in range(round(TICK_S / LOOK_S)):
            await asyncio.sleep(LOOK_S)
            if self.service.rollout.stage is not before:
                before = self.service.rollout.stage
                await asyncio.to_thread(self.service.rollout.flush)

    async def unjudged(self, error: Exception) -> None:
        """The guard failed: that is never a pass, so it pauses, and at last rolls back."""
        self._failed += 1
        why = f"the guard failed {self._failed} times: {type(error).__name__}: {error}"
        moves = {PAUSED_BY: self.service.rollout.pause, ROLLED_BACK_BY: self.service.rollout.abort}
        if self._failed in moves:
            self.say(why)
            with contextlib.suppress(UserError):  # paused already
                await asyncio.to_thread(moves[self._failed], why, "guard")

    async def _tick(self) -> None:
        rollout, candidate = self.service.rollout, self.service.pair.candidate
        if candidate is not None:
            rollout.gauge(candidate.counts.memory_bytes, candidate.pending)
        for event in await asyncio.to_thread(rollout.tick):
            share = f"{event.weight / 100:g} % of the requests"
            self.say(f"{event.kind}: {event.stage}, {share}: {event.reason} ({event.by})")

    async def _begin(self) -> None:
        """Validate a new candidate; then let the rollout route.

        Before the candidate's process has opened its file no request is routed to it, else the
        first ones after a restart would count as its crashes.
        """
        assert self.service.pair.candidate is not None
        opened = await self.service.pair.candidate.first_start()
        rollout = self.service.rollout
        if rollout.stage is Stage.IDLE:
            await asyncio.to_thread(rollout.begin)
        if rollout.stage is Stage.VALIDATE:
            await self._validate(opened)
        elif self._unknown():
            await self._validate_again(opened)
        self.service.pair.judge = self.service.rollout

    def _unknown(self) -> bool:
        """Whether what validation saw is lost, or was of another original."""
        going = self.service.rollout.stage is not Stage.ROLLED_BACK
        return going and Validation.kept(self.folder, *self.digests) is None

    async def _validate_again(self, opened: bool) -> None:
        """Find the bound again, and go on where the rollout was, where the candidate still passes.

        One that cannot be opened now is left to the guards, which see its crashes.
        """
        if not opened:
            return
        what = f"{validation.FILE} or {validation.PROFILE}"
        self.say(f"{self.folder}: {what} is gone, damaged or of something else: validating again.")
        found = await self._validated()
        self._use(found)
        if not found.passed:
            await asyncio.to_thread(self.service.rollout.abort, found.why, "guard")

    async def _validate(self, opened: bool) -> None:
        pair = self.service.pair
        assert pair.candidate is not None
        if not opened:
            why = f"the candidate {pair.candidate.why}"
            await asyncio.to_thread(self.service.rollout.validated, False, why)
            return
        found = Validation.kept(self.folder, *self.digests)
        if found is None:
            found = await self._validated()
        self._use(found)
        if self.service.rollout.stage is Stage.VALIDATE:  # else it was aborted meanwhile
            await asyncio.to_thread(self.service.rollout.validated, found.passed, found.why)

    async def _validated(self) -> Validation:
        """Run both models on real examples, and keep what came of it."""
        pair = self.service.pair
        try:
            rows = await asyncio.to_thread(self.examples.read)
        except UNREADABLE:
            rows = await asyncio.to_thread(self._made)
        found, profile = await validation.validate(pair, rows, self.digests, self.known)
        found = found.saved(self.folder, profile)
        self.say(f"Validated: {found.why}.")
        return found

    def _made(self) -> list[list[np.ndarray]]:
        signature = self.service.pair.original.signature
        assert signature is not None
        self.say(f"Reading examples of {self.examples.source}")
        self.examples.make([item["name"] for item in signature.inputs])
        return self.examples.read()
