"""A model that answers: its queue, its batches, and its process, started again where it dies."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paredown.ship.serve import batching
from paredown.ship.serve.child import Child, Died, Opening
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.signature import Signature, varies_first

OPEN_S = 120.0  # the longest that opening and warming up may take
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 30.0  # between starts; doubled each time
STEADY_S = 60.0  # a process that has lived so long starts anew at once


class Fault(Exception):
    """A model did not answer.

    Attributes:
        kind: "crash", "deadline" or "error", the last from the model itself.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Limits:
    """How a model is used.

    Attributes:
        batch: the most examples that are run together.
        wait_s: how long the first of a batch waits for others while the model is free.
        pending: the most requests that wait; more are refused at once, and so are those that would
            wait for half of the deadline.
        background: the same of those that nobody waits for; more are dropped.
        deadline_s: the longest that a request may take with its wait.
        hang_s: the longest that a batch may take, after which the process is killed.
        patient: whether requests wait, within their deadline, while the process starts again, and
            one that it died of is tried once more; else they fail at once.
    """

    batch: int = 32
    wait_s: float = 0.0
    pending: int = 512
    background: int = 64
    deadline_s: float = 10.0
    hang_s: float = 20.0
    patient: bool = False


@dataclass(frozen=True)
class Answer:
    """What a model gave, and how long that took: with its wait, and by itself, in ms."""

    outputs: dict[str, np.ndarray]
    total_ms: float
    queue_ms: float
    compute_ms: float
    parts_ms: dict[str, float] = field(default_factory=dict)  # end to end: of each part


@dataclass(eq=False)
class _Job:
    arrays: list[np.ndarray]
    rows: int
    key: Hashable
    future: asyncio.Future[Answer]
    born: float
    again: bool = False  # it was in a batch that failed, and now runs alone


@dataclass
class Counts:
    """What a model has done since the server began, for the metrics."""

    executions: int = 0
    examples: int = 0
    starts: int = 0
    memory_bytes: int = 0
    shed: int = 0


class Worker:
    """One model in its process.

    Attributes:
        signature: None until it is ready for the first time.
        why: why it is not ready, in words; "" where it is.
    """

    def __init__(self, name: str, opening: Opening, limits: Limits) -> None:
        self.name, self.opening, self.limits = name, opening, limits
        self.signature: Signature | None = None
        self.runtime = ""
        self.why = "is starting"
        self.counts = Counts()
        self.pid: int | None = None
        self._waiting: deque[_Job] = deque()
        self._behind: deque[_Job] = deque()  # background
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()  # set when it becomes ready, or fails to
        self._busy = False
        self._each_s = 0.0  # of a batch's time, what a request of it takes; the newest count most
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        return not self.why

    @property
    def pending(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether another request would be refused: too many wait, or so many that the last would
        miss its deadline, which is then no fault of the model."""
        expected_s = len(self._waiting) * self._each_s
        return len(self._waiting) >= self.limits.pending or expected_s > self.limits.deadline_s / 2

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervise())

    async def first_start(self) -> bool:
        """Wait until it is ready, or could not be started; says which."""
        await self._changed.wait()
        return self.ready

    async def stop(self, drain_s: float = 0.0) -> None:
        """Answer what waits, for so long at most, then end the process."""
        until = time.monotonic() + drain_s
        while (self._waiting or self._busy) and self.ready and time.monotonic() < until:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(Fault("crash", "the server is ending"))

    # --- asking -----------------------------------------------------------------------------------

    async def infer(self, arrays: list[np.ndarray], background: bool = False) -> Answer:
        """Run the model on one request's arrays, in its order.

        Raises:
            Fault: it did not answer.
            Refused: too many requests wait (503).
        """
        if not self.ready and not (self.limits.patient and self.signature):
            raise Fault("crash", f"{self.name} {self.why}")
        queue = self._behind if background else self._waiting
        if len(queue) >= self.limits.background if background else self.full:
            self.counts.shed += 1
            raise Refused(503, f"{self.name}: {len(queue)} requests wait already; try again later.")
        job = self._job(arrays)
        queue.append(job)
        self._wake.set()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.limits.deadline_s, self._expire, job)
        try:
            return await job.future
        finally:
            timer.cancel()

    def _job(self, arrays: list[np.ndarray]) -> _Job:
        assert self.signature is not None
        key = batching.key_of(arrays, self.signature.batched)
        rows = len(arrays[0]) if arrays and arrays[0].ndim else 1
        future = asyncio.get_running_loop().create_future()
        return _Job(arrays, rows, key, future, time.perf_counter())

    def _expire(self, job: _Job) -> None:
        if not job.future.done():
            text = f"{self.name}: no answer within {self.limits.deadline_s:g} s"
            job.future.set_exception(Fault("deadline", text))

    # --- its process ------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Start the process, serve, and start it again, ever later where it dies early."""
        backoff = FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            try:
                await self._life()
            except Died as error:
                self.why = f"is not ready: its process {error}"
            except OSError as error:
                self.why = f"is not ready: its process cannot be started: {error}"
            self.pid = None
            self._changed.set()
            if not self.limits.patient:
                self._fail_all(Fault("crash", f"{self.name} {self.why}"))
            if time.monotonic() - began > STEADY_S:
                backoff = FIRST_BACKOFF_S
            await asyncio.sleep(backoff)
            backoff = min(LONGEST_BACKOFF_S, 2 * backoff)

    async def _life(self) -> None:
        """One process from its start to its end.

        Raises:
            Died: how it ended.
        """
        child = await Child.started(self.opening)
        self.counts.starts += 1
        self.pid = child.pid
        try:
            found = await self._within(child, OPEN_S, child.open(self.opening))
            self._learn(found)
            self.why = ""
            self._changed.set()
            while True:
                await self._step(child)
        finally:
            await child.end()

    async def _within(self, child: Child, seconds: float, work: Any) -> Any:
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            await child.end()
            raise Died(f"took more than {seconds:g} s and was killed") from None

    def _learn(self, found: dict[str, Any]) -> None:
        self.runtime = found["runtime"]
        if self.signature is None:  # else a later start, where nothing has changed
            batched, most = varies_first(found["inputs"])
            inputs, outputs = tuple(found["inputs"]), tuple(found["outputs"])
            batched = batched and found["batched"]
            self.signature = Signature(inputs, outputs, batched, most if batched else None)

    async def _step(self, child: Child) -> None:
        """Wait for work, and do one batch of it."""
        jobs = await self._batch()
        if not jobs:
            return
        self._busy = True
        try:
            await self._run(child, jobs)
        finally:
            self._busy = False

    async def _batch(self) -> list[_Job]:
        """The jobs to run next; none where it is to be looked again."""
        while not (self._waiting or self._behind):
            self._wake.clear()
            await self._wake.wait()
        if self._waiting:
            await self._gather()
        queue = self._waiting or self._behind
        if queue and queue[0].again:
            return [queue.popleft()]
        return batching.take(queue, self._most(), lambda job: not job.future.done())

    def _most(self) -> int:
        most = self.signature.most if self.signature else None
        return self.limits.batch if most is None else min(most, self.limits.batch)

    async def _gather(self) -> None:
        """Wait for more to go with the first one, where that is wanted."""
        first = self._waiting[0]
        left = first.born + self.limits.wait_s - time.perf_counter()
        while left > 0 and first.key is not None:
            if sum(job.rows for job in self._waiting) >= self._most():
                return
            self._wake.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), left)
            left = first.born + self.limits.wait_s - time.perf_counter()

    async def _run(self, child: Child, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        arrays = batching.join([job.arrays for job in jobs])
        work = child.ask({"command": "run"}, arrays)
        try:
            head, outputs = await self._within(child, self.limits.hang_s, work)
        except Died as error:
            self._again(jobs, Fault("crash", f"{self.name}: its process {error}"))
            raise
        spent = (time.perf_counter() - began) / len(jobs)
        self._each_s = spent if not self._each_s else 0.8 * self._each_s + 0.2 * spent
        self.counts.executions += 1
        self.counts.examples += sum(job.rows for job in jobs)
        if "error" in head:
            self._again(jobs, Fault("error", head["error"]))
            return
        self.counts.memory_bytes = head["memory"]
        self._share(jobs, head, outputs, began)

    def _share(
        self, jobs: list[_Job], head: dict[str, Any], outputs: Sequence[np.ndarray], began: float
    ) -> None:
        """Give each job its rows."""
        assert self.signature is not None
        try:
            parts = batching.part(outputs, [job.rows for job in jobs])
        except ValueError as error:
            self._again(jobs, Fault("error", str(error)))
            return
        names = [item["name"] for item in self.signature.outputs]
        now = time.perf_counter()
        spent = {name: ms for name, ms in head.items() if name.endswith("_ms")}
        for job, arrays in zip(jobs, parts, strict=True):
            waited, whole = (began - job.born) * 1e3, (now - job.born) * 1e3
            found = dict(zip(names, arrays, strict=False))
            answer = Answer(found, whole, waited, head["compute_ms"], spent)
            if not job.future.done():
                job.future.set_result(answer)

    def _again(self, jobs: list[_Job], fault: Fault) -> None:
        """Run each of a failed batch alone, for one of them may have failed it; one that was alone
        has failed, unless its process died, of which it may be innocent."""
        once_more = self.limits.patient and fault.kind == "crash" and not jobs[0].again
        if len(jobs) == 1 and not once_more:
            _fail(jobs[0], fault)
            return
        for job in reversed(jobs):
            job.again, job.key = True, None
            self._waiting.appendleft(job)

    def _fail_all(self, fault: Fault) -> None:
        for queue in (self._waiting, self._behind):
            while queue:
                _fail(queue.popleft(), fault)


def _fail(job: _Job, fault: Fault) -> None:
    if not job.future.done():
        job.future.set_exception(fault)
