"""The original and the candidate as one model: who answers, who answers in its place, and what is
seen of both.

The rollout decides, here it is done: a candidate that crashes, is late, gives NaN or infinity where
the original gives numbers, or another shape, is answered for by the original, and the client sees
nothing of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paredown.ship.guard.observation import CANDIDATE, ORIGINAL, Observation
from paredown.ship.guard.stages import Route
from paredown.ship.serve.compare import (
    Agreement,
    Outputs,
    bad_numbers,
    distance,
    rows_of,
    wrong_shape,
)
from paredown.ship.serve.kept import Kept
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.workers import Answer, Fault, Worker

MOST_ROWS = 64  # of one request that are compared
MOST_SHADOW_BYTES = 2**23  # of a request's inputs; a larger one is not shadowed
SAMPLES_PER_S = 100  # of requests whose values are looked at for drift
BAD = "NaN or infinity in its outputs"
MEMORY = ("MemoryError", "bad_alloc", "BFCArena", "out of memory")  # in a model's own words


class Judge(Protocol):
    """What a `Rollout` does for a pair."""

    def route(self, key: bytes) -> Route: ...
    def observe(self, observation: Observation) -> object: ...


@dataclass(frozen=True)
class Served:
    """An answer, and which model gave it; ``fault`` of the one that should have."""

    answer: Answer
    model: str
    fault: str = ""


class Pair:
    """Both models behind one name.

    Args:
        candidate: None where the original serves alone.
        judge: None where the original serves alone.
        agreement: how a pair's outputs are compared.
        kept: what is kept of recent requests, for late labels and for the page.
    """

    def __init__(
        self,
        original: Worker,
        candidate: Worker | None,
        judge: Judge | None,
        agreement: Agreement,
        kept: Kept,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.original, self.candidate = original, candidate
        self.judge, self.agreement, self.kept = judge, agreement, kept
        self.dropped = 0  # shadows
        self._monotonic = monotonic
        self._shadows: set[asyncio.Task[None]] = set()
        self._next_sample: dict[str, float] = {}

    async def infer(self, arrays: list[np.ndarray], key: bytes, name: str = "") -> Served:
        """Answer a request by the model that the rollout chooses, or by the original.

        Args:
            arrays: in the original's order.
            key: what is routed by.
            name: the request's own, by which a late label finds it; "" for none.

        Raises:
            Refused: neither answers.
        """
        route = self._route(key)
        if route.model == CANDIDATE:
            served = await self._candidate(arrays)
        else:
            served = Served(await self._original(arrays), ORIGINAL)
        if name:
            self.kept.answered(name, served.model, served.answer.outputs)
        self._observe_answer(served, arrays)
        if route.shadow:
            self._shadow(served, arrays, name)
        return served

    def _route(self, key: bytes) -> Route:
        if self.judge is None or self.candidate is None:
            return Route(ORIGINAL, False)
        return self.judge.route(key)

    def observe(self, observation: Observation) -> None:
        if self.judge is not None:
            self.judge.observe(observation)

    # --- who answers ------------------------------------------------------------------------------

    async def _original(self, arrays: list[np.ndarray]) -> Answer:
        """The original's answer.

        Raises:
            Refused: there is none.
        """
        try:
            return await self.original.infer(arrays)
        except Fault as fault:
            if fault.kind != "error":
                self.observe(Observation(ORIGINAL, fault=fault.kind))
            raise refusal(fault) from fault

    async def _candidate(self, arrays: list[np.ndarray]) -> Served:
        """The candidate's answer, or the original's where that one cannot be given.

        Raises:
            Refused: neither answers.
        """
        assert self.candidate is not None
        try:
            answer = await self.candidate.infer(arrays)
        except Refused:  # its queue is full, which is no fault of the model
            return Served(await self._original(arrays), ORIGINAL)
        except Fault as fault:
            return await self._instead(arrays, fault.kind, str(fault))
        outputs = answer.outputs
        wrong = self.wrong(outputs, arrays)
        if wrong:
            return await self._instead(arrays, "shape", wrong, outputs)
        if bad_numbers(outputs):
            return await self._instead(arrays, "nan", BAD, outputs)
        return Served(answer, CANDIDATE)

    async def _instead(
        self, arrays: list[np.ndarray], kind: str, why: str, outputs: Any = None
    ) -> Served:
        """The original's answer in place of a candidate's that is faulty.

        What the original does not give either is no fault: an input that both refuse, numbers that
        neither has.
        """
        certain = kind in ("crash", "deadline")  # else the original's answer says whether it is one
        if certain:
            self.observe(Observation(CANDIDATE, fault=kind))
        answer = await self._original(arrays)
        if not certain and bad_numbers(answer.outputs):
            return Served(answer, ORIGINAL)
        if not certain:
            self.observe(Observation(CANDIDATE, fault=kind))
        self.kept.fell_back(kind, why, arrays, outputs, answer.outputs)
        return Served(answer, ORIGINAL, kind)

    def wrong(self, outputs: Outputs, arrays: list[np.ndarray]) -> str:
        """What is wrong with the shapes of a candidate's outputs, "" where nothing is."""
        assert self.original.signature is not None
        rows = row_count(arrays) if self.original.signature.batched else 0
        return wrong_shape(outputs, self.original.signature.outputs, rows)

    # --- what is seen -----------------------------------------------------------------------------

    def _observe_answer(self, served: Served, arrays: list[np.ndarray]) -> None:
        if self.judge is None:
            return
        inputs = outputs = None
        if self._sampled(served.model):
            inputs, outputs = numbers(self.named(arrays)), numbers(served.answer.outputs)
        latency = served.answer.total_ms
        self.observe(Observation(served.model, latency, inputs=inputs, outputs=outputs))

    def _sampled(self, model: str) -> bool:
        """Whether this answer's values are looked at; so many a second of each model's are."""
        now = self._monotonic()
        if now < self._next_sample.get(model, now):
            return False
        self._next_sample[model] = now + 1 / SAMPLES_PER_S
        return True

    def named(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays by the names of the original's inputs."""
        assert self.original.signature is not None
        names = (item["name"] for item in self.original.signature.inputs)
        return dict(zip(names, arrays, strict=True))

    def _shadow(self, served: Served, arrays: list[np.ndarray], name: str) -> None:
        """Let the other model answer too, where there is room for that."""
        assert self.candidate is not None
        small = sum(array.nbytes for array in arrays) <= MOST_SHADOW_BYTES
        if len(self._shadows) >= self.candidate.limits.background or not small:
            self.dropped += 1
            return
        if served.fault:  # the original has answered in its place: nothing is left to compare
            return
        work: Coroutine[Any, Any, None] = self._compare(served, arrays, name)
        task = asyncio.create_task(work, name=name)
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def both(self, name: str) -> None:
        """Wait until both models have answered a request, where the other one is about to."""
        beside = [task for task in self._shadows if task.get_name() == name]
        if beside:
            await asyncio.wait(beside)

    async def _compare(self, served: Served, arrays: list[np.ndarray], name: str) -> None:
        assert self.candidate is not None
        by_original = served.model == ORIGINAL
        other = self.candidate if by_original else self.original
        try:
            answer = await other.infer(arrays, background=True)
        except Refused:
            self.dropped += 1
            return
        except Fault as fault:
            none = fault.kind == "error" and bad_numbers(served.answer.outputs)
            if by_original and not none:
                self.observe(Observation(CANDIDATE, fault=fault.kind, shadow=True))
                self.kept.fell_back(
                    fault.kind, str(fault), arrays, None, served.answer.outputs, shadow=True
                )
            return
        both = (served.answer, answer) if by_original else (answer, served.answer)
        if name:
            self.kept.answered(name, CANDIDATE if by_original else ORIGINAL, answer.outputs)
        self._judge_pair(*both, arrays, answer.total_ms, by_original)

    def _judge_pair(
        self,
        original: Answer,
        candidate: Answer,
        arrays: list[np.ndarray],
        shadow_ms: float,
        by_original: bool,
    ) -> None:
        """Observe a pair; the latency is that of the model that answered beside.

        An example for which the original itself gives NaN or infinity is no evidence of anything:
        any client may send such numbers.
        """
        one, other = original.outputs, candidate.outputs
        fault, why = self.fault(one, other, arrays)
        rows = row_count(arrays)
        parts = [] if fault else _finite(one, other, rows)
        if not fault and any(bad_numbers(second) for _, _, second in parts):
            fault, why = "nan", BAD
        if fault:
            self.observe(Observation(CANDIDATE, shadow_ms, fault, shadow=True))
            self.kept.fell_back(fault, why, arrays, other, one, shadow=True)
            return
        if parts and not by_original:
            self.observe(Observation(ORIGINAL, shadow_ms, shadow=True))
        latency = shadow_ms if by_original else None
        sample = numbers(other) if by_original and self._sampled(CANDIDATE) else None
        for place, first, second in parts:
            agreed, apart = self.agreement.agree(first, second), distance(first, second)
            if not agreed:
                row = [array[place : place + 1] for array in arrays] if rows > 1 else arrays
                self.kept.fell_back("disagree", "", row, second, first, shadow=True)
            known = apart if np.isfinite(apart) else None
            seen = Observation(
                CANDIDATE, latency, shadow=True, agreed=agreed, distance=known, outputs=sample
            )
            self.observe(seen)
            latency = sample = None

    def fault(
        self,
        original: Outputs,
        candidate: Outputs,
        arrays: list[np.ndarray],
    ) -> tuple[str, str]:
        """What is wrong with a candidate's outputs beside the original's, and why; nothing where
        the original's own hold NaN or infinity."""
        if bad_numbers(original):
            return "", ""
        wrong = self.wrong(candidate, arrays)
        if wrong:
            return "shape", wrong
        return ("nan", BAD) if bad_numbers(candidate) else ("", "")


def _finite(original: Outputs, candidate: Outputs, rows: int) -> list[tuple[int, Outputs, Outputs]]:
    """Place and outputs of each example for which the original gives numbers, where both models
    give outputs of the same examples."""
    ours, theirs = (rows_of(each, rows, MOST_ROWS) for each in (original, candidate))
    pairs = enumerate(zip(ours, theirs, strict=False))
    return [(n, *each) for n, each in pairs if not bad_numbers(each[0])]


def numbers(arrays: Outputs) -> Outputs:
    """Those that hold numbers, for drift."""
    return {name: array for name, array in arrays.items() if array.dtype.kind in "biuf"}


def row_count(arrays: list[np.ndarray]) -> int:
    """The examples of a request."""
    return len(arrays[0]) if arrays and arrays[0].ndim else 1


def refusal(fault: Fault) -> Refused:
    """What a client is told where no model answers: its own inputs' fault (400), or not (503)."""
    text = str(fault)
    if fault.kind == "error" and not any(word in text for word in MEMORY):
        return Refused(400, f"the model does not take these inputs: {text}")
    return Refused(503, text)
