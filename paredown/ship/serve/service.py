"""What the endpoint does, without HTTP: requests to models, late labels, counters."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.ship.guard.observation import CANDIDATE, ORIGINAL, Observation
from paredown.ship.guard.stages import Stage
from paredown.ship.serve import metrics
from paredown.ship.serve.pair import Pair, Served, refusal, row_count
from paredown.ship.serve.protocol import Request
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.scoring import Scorer, by_class
from paredown.ship.serve.workers import Answer, Fault, Worker

VERSIONS = {"1": ORIGINAL, "2": CANDIDATE}
NUMBERS = {model: version for version, model in VERSIONS.items()}
ROUTED_BY = "routing_key"  # the parameter that keeps a user's requests with one model
ACTIONS = ("promote", "pause", "resume", "abort")


@dataclass
class Service:
    """A name with two models behind it.

    Attributes:
        rollout: None where the original serves alone; ``alone`` then says why.
        score: of a model's outputs for a late label.
    """

    name: str
    pair: Pair
    rollout: Any = None
    alone: str = ""
    score: Scorer = by_class
    counters: metrics.Counters = field(default_factory=metrics.Counters)
    draining: bool = False
    _keys: itertools.count[int] = field(default_factory=itertools.count)

    # --- models -----------------------------------------------------------------------------------

    @property
    def workers(self) -> dict[str, Worker]:
        found = {"1": self.pair.original}
        return found | ({"2": self.pair.candidate} if self.pair.candidate else {})

    def ready(self) -> bool:
        """Whether requests are answered: as long as the original can."""
        return self.pair.original.ready and not self.draining

    def worker(self, name: str, version: str) -> Worker:
        """A model by its name and version; without a version the original, which is the contract.

        Raises:
            Refused: there is none (404).
        """
        if name != self.name:
            raise Refused(404, f"no model {name[:100]!r}; the one here is {self.name!r}.")
        if version not in ("", *self.workers):
            names = " and ".join(f"{v} ({VERSIONS[v]})" for v in self.workers)
            raise Refused(404, f"no version {version[:100]!r} of {self.name!r}; there are {names}.")
        return self.workers[version or "1"]

    def check_room(self, version: str) -> None:
        """Refuse a request, before its body is read, where all that may answer it are full.

        Raises:
            Refused: they are (503).
        """
        routed = self.rollout is not None and self.rollout.weight > 0
        both = list(self.workers.values()) if routed else [self.pair.original]
        answering = [self.workers[version]] if version else both
        if all(worker.full for worker in answering):
            for worker in answering:
                worker.counts.shed += 1
            raise Refused(503, f"{self.name}: too many requests wait already; try again later.")

    def metadata(self, name: str, version: str) -> dict[str, Any]:
        """What a model takes and gives, in the protocol's form.

        Raises:
            Refused: there is none, or it has never been ready (503).
        """
        worker = self.worker(name, version)
        if worker.signature is None:
            raise Refused(503, f"{worker.name} {worker.why}")
        platform = worker.runtime.split(" ")[0]
        said = {"name": self.name, "versions": list(self.workers), "platform": platform}
        return said | worker.signature.metadata()

    # --- inference --------------------------------------------------------------------------------

    async def infer(self, name: str, version: str, request: Request) -> tuple[str, Answer]:
        """The version that answered, and its answer.

        Raises:
            Refused: there is none.
        """
        worker = self.worker(name, version)
        if self.draining:
            raise Refused(503, "the server is ending; it takes no more requests.")
        if worker.signature is None:
            raise Refused(503, f"{worker.name} {worker.why}")
        arrays = worker.signature.ordered(request)
        served = await self._served(worker, version, request, arrays)
        self._counted(served, row_count(arrays))
        return NUMBERS[served.model], served.answer

    async def _served(
        self, worker: Worker, version: str, request: Request, arrays: list[np.ndarray]
    ) -> Served:
        if not version:
            return await self.pair.infer(arrays, self._key(request), request.id)
        try:
            return Served(await worker.infer(arrays), VERSIONS[version])
        except Fault as fault:
            raise refusal(fault) from fault

    def _key(self, request: Request) -> bytes:
        """What a request is routed by: the user's own key, its id, or its place in the order."""
        given = request.parameters.get(ROUTED_BY) or request.parameters.get("sequence_id")
        if isinstance(given, (str, int)) and given:
            return str(given).encode()
        return request.id.encode() if request.id else str(next(self._keys)).encode()

    def _counted(self, served: Served, rows: int) -> None:
        version, answer = NUMBERS[served.model], served.answer
        self.count("nv_inference_request_success", version)
        self.count("nv_inference_count", version, rows)
        self.count("nv_inference_request_duration_us", version, round(answer.total_ms * 1e3))
        self.count("nv_inference_queue_duration_us", version, round(answer.queue_ms * 1e3))
        self.count(
            "nv_inference_compute_infer_duration_us", version, round(answer.compute_ms * 1e3)
        )
        for part in ("preprocess", "postprocess"):
            if f"{part}_ms" in answer.parts_ms:
                spent = round(answer.parts_ms[f"{part}_ms"] * 1e3)
                self.count(f"paredown_{part}_duration_us", version, spent)
        if served.fault:
            labels = (*self.labels("2"), ("fault", served.fault))
            self.counters.add("paredown_fallback", labels)

    def labels(self, version: str) -> metrics.Labels:
        return metrics.labels(model=self.name, version=version)

    def count(self, metric: str, version: str, value: float = 1) -> None:
        self.counters.add(metric, self.labels(version), value)

    def metrics(self, told: dict[str, Any]) -> str:
        """All counters and gauges as text; ``told`` is what `look` gave."""
        now = metrics.Counters(dict(self.counters.values))
        for version, worker in self.workers.items():
            named = self.labels(version)
            now.add("nv_inference_exec_count", named, worker.counts.executions)
            now.add("nv_inference_pending_request_count", named, worker.pending)
            now.add("paredown_model_memory_bytes", named, worker.counts.memory_bytes)
            now.add("paredown_model_starts", named, worker.counts.starts)
            for each in ("nv_inference_request_success", "nv_inference_request_failure"):
                now.add(each, named, 0)
        named = metrics.labels(model=self.name)
        now.add("paredown_shadow_dropped", named, self.pair.dropped)
        if self.rollout is not None:
            now.values |= metrics.of_rollout(told, [str(each) for each in Stage], named).values
        return metrics.text(now.values.items())

    # --- the rollout ------------------------------------------------------------------------------

    def look(self) -> dict[str, Any]:
        """The rollout's own status. It may wait for the disk, and is asked from another thread."""
        if self.rollout is None:
            return {"stage": "idle", "weight": 0}
        found: dict[str, Any] = self.rollout.status()
        return found

    def status(self, told: dict[str, Any]) -> dict[str, Any]:
        """What `look` gave, with both workers and recent examples."""
        models = {
            VERSIONS[version]: {
                "ready": worker.ready,
                "why": worker.why,
                "runtime": worker.runtime,
                "file": worker.opening.file.name,
                "pid": worker.pid,
                "pending": worker.pending,
                "memory_bytes": worker.counts.memory_bytes,
                "starts": worker.counts.starts,
                "examples": worker.counts.examples,
                "batches": worker.counts.executions,
            }
            for version, worker in self.workers.items()
        }
        return told | {
            "model": self.name,
            "alone": self.alone,
            "models": models,
            "steps": list(self.rollout.policy.steps) if self.rollout is not None else [],
            "bound": self.rollout.bound.upper if self.rollout is not None else None,
            "psi": self.rollout.policy.psi if self.rollout is not None else None,
            "examples": self.pair.kept.examples(),
            "shadows_dropped": self.pair.dropped,
        }

    def act(self, action: str, reason: Any, by: str) -> dict[str, Any]:
        """Promote, pause, resume or abort by hand; then as `look`, also from another thread.

        Raises:
            Refused: no reason (400), or it cannot be done now (409).
        """
        if not isinstance(reason, str) or not 0 < len(reason.strip()) <= 1000:
            raise Refused(400, "reason: expected a text of up to 1000 characters; it is kept.")
        if self.rollout is None:
            raise Refused(409, f"rollout: the original serves alone: {self.alone}")
        try:
            getattr(self.rollout, action)(reason.strip(), by)
        except UserError as error:
            raise Refused(409, str(error)) from error
        return self.look()

    async def feedback(self, name: str, said: dict[str, Any]) -> dict[str, Any]:
        """Score both models' answers to a request by a label that came later, and where it came
        before the shadow's answer, once that is there.

        A request's first label counts; a second one is answered with the same scores, and says
        that it was not counted: else one label sent again and again would decide.

        Raises:
            Refused: no such model or request, or no label for it.
        """
        self.worker(name, "")
        if not isinstance(said.get("id"), str) or "target" not in said:
            raise Refused(400, "feedback: expected {'id': the request's, 'target': its label}.")
        await self.pair.both(said["id"])
        found = self.pair.kept.entry(said["id"])
        if found is None:
            raise Refused(404, f"feedback: no answer to request {said['id'][:100]!r} is kept here.")
        if not found.scores:
            given, target = dict(found.outputs), said["target"]
            scores = {model: await self.score(each, target) for model, each in given.items()}
            if not found.scores:  # else another label was scored meanwhile
                found.scores = scores
                self._observe_scores(scores)
                return {"id": said["id"], "scores": scores, "counted": True}
        return {"id": said["id"], "scores": found.scores, "counted": False}

    def _observe_scores(self, scores: dict[str, float]) -> None:
        if CANDIDATE in scores:
            other = scores.get(ORIGINAL)
            seen = Observation(CANDIDATE, score=scores[CANDIDATE], score_of_other=other)
        else:
            seen = Observation(ORIGINAL, score=scores[ORIGINAL])
        self.pair.observe(seen)
