"""`paredown serve`: a run's original and its artifact behind one endpoint, from start to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.files import read_parts, sha256
from paredown.core.results import GOLDEN, Artifact, Run
from paredown.core.settings import MOST_THREADS, check_above_zero, check_count, require
from paredown.core.source import Source
from paredown.ship.guard.policy import Policy
from paredown.ship.serve.child import Opening
from paredown.ship.serve.compare import Agreement
from paredown.ship.serve.examples import Examples
from paredown.ship.serve.extra import event_loop
from paredown.ship.serve.kept import Kept
from paredown.ship.serve.pair import Pair
from paredown.ship.serve.rollout_runner import Runner
from paredown.ship.serve.scoring import ByTask
from paredown.ship.serve.service import Service
from paredown.ship.serve.task_file import check_task_file
from paredown.ship.serve.token import token
from paredown.ship.serve.validation import Known
from paredown.ship.serve.workers import Limits, Worker
from paredown.targets.artifact import check_kept
from paredown.targets.runtimes import ready, source

DRAIN_S = 10.0  # the longest that requests which have come may take at the end
PATIENCE = 10  # the original may take so many times the candidate's deadline: nobody stands in


@dataclass(frozen=True)
class Serving:
    """What is to be served, and how.

    Attributes:
        run: the run's folder.
        source: of the task, for validation; None where none is known.
        lacking: why no task is known, in a sentence; "" where one is.
        scoring: of the task that scores late labels; None scores by the named class.
        deadline_ms: the longest that a client waits for the candidate before the original answers.
        end_to_end: run the task's preprocessing and postprocessing around the models.
        even_so: serve a run whose goals were missed.
        token_file, state: of the user's; None for those in the run's folder.
    """

    run: Path
    host: str = "127.0.0.1"
    port: int = 8080
    max_batch: int = 32
    max_wait_ms: float = 0.0
    threads: int = 1
    deadline_ms: float = 1000.0
    policy: Policy = field(default_factory=Policy)
    source: Source | None = None
    scoring: Source | None = None
    lacking: str = ""
    even_so: bool = False
    end_to_end: bool = False
    token_file: Path | None = None
    state: Path | None = None

    def __post_init__(self) -> None:
        check_count("port", self.port, 0, 2**16 - 1)
        check_count("max-batch", self.max_batch)
        check_count("threads", self.threads, most=MOST_THREADS)
        check_above_zero("deadline-ms", self.deadline_ms)
        require("max-wait-ms", self.max_wait_ms, 0 <= self.max_wait_ms <= 1e4, "0 to 10000")
        if self.source is not None and not Path(self.source.file).exists():
            raise UserError(f"file: {self.source.file}: no such file.")
        if self.scoring is not None and self.scoring.is_python:
            check_task_file(Path(self.scoring.file))
        if self.end_to_end and self.source is None:
            raise UserError("end-to-end: expected the file of the task; name it with --file.")

    @property
    def folder(self) -> Path:
        return self.state or self.run / "serve"


def serve(asked: Serving, say: Callable[[str], None] = print) -> None:
    """Serve until the process is told to end.

    Raises:
        UserError: the run is not finished or missed its goals, its original cannot be opened, or
            the port is in use.
    """
    run = Run.load(asked.run)
    if not run.met and not asked.even_so:
        raise UserError(
            f"{asked.run}: the run missed its goals: {run.verdict} Serve it with --even-so."
        )
    if run.original is None:
        raise UserError(f"{asked.run}: its run has no original, which must stand behind it.")
    original = check_kept(run.original)
    ready(run.original.runtime)
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{asked.folder}: cannot be made: {error.strerror or error}.") from error
    event_loop().run(_serve(asked, run, original, say))


def _worker(asked: Serving, name: str, artifact: Artifact, outputs: Any) -> Worker:
    deadline_s = asked.deadline_ms / 1e3 * (PATIENCE if name == "original" else 1)
    limits = Limits(
        batch=asked.max_batch,
        wait_s=asked.max_wait_ms / 1e3,
        deadline_s=deadline_s,
        hang_s=2 * deadline_s,
        patient=name == "original",
    )
    maker, beside = "", {}
    if asked.end_to_end:
        maker = str(Path(__file__).with_name("pipeline_worker.py"))
        assert asked.source is not None
        beside = {"source": asked.source.to_json(), "outputs": outputs}
    opening = Opening(
        Path(artifact.path),
        source(artifact.runtime),
        asked.threads,
        maker=maker,
        beside=beside,
    )
    return Worker(name, opening, limits)


def _candidate(asked: Serving, run: Run) -> tuple[Worker | None, str]:
    """The candidate, or why there is none."""
    if run.artifact is None:
        return None, "the run has no artifact."
    try:
        check_kept(run.artifact)
        ready(run.artifact.runtime)
    except UserError as error:
        return None, str(error)
    return _worker(asked, "candidate", run.artifact, run.details.get("outputs")), ""


def _golden(folder: Path, run: Run) -> Path | None:
    """The run's golden set, where it is the one that the run wrote."""
    file, kept = folder / GOLDEN, run.details.get("golden")
    if not kept:
        return None
    try:
        return file if sha256(read_parts(file)) == kept["sha256"] else None
    except OSError:
        return None


async def _serve(asked: Serving, run: Run, file: Path, say: Callable[[str], None]) -> None:
    from paredown.ship.serve import app, listening

    assert run.original is not None
    port = listening.free_port(asked.host, asked.port)
    secret, made = token(asked.folder, asked.token_file)
    original = _worker(asked, "original", run.original, run.details.get("outputs"))
    candidate, lacking = _candidate(asked, run)
    service = Service(run.name, Pair(original, candidate, None, Agreement(), Kept()))
    digests = (run.original.sha256, run.artifact.sha256 if run.artifact else "")
    golden = None if asked.end_to_end else _golden(asked.run, run)
    source_of = Examples(asked.folder, asked.source, asked.end_to_end, golden, asked.lacking)
    runner = Runner(service, asked.policy, asked.folder, digests, source_of, say, Known.of(run))
    runner.alone(lacking) if lacking else runner.open()
    workers = [each for each in (original, candidate) if each]
    for worker in workers:
        worker.start()
    try:
        if not await original.first_start():
            raise UserError(f"{file}: the original {original.why}.")
        if asked.scoring and not asked.end_to_end and original.signature:
            names = [item["name"] for item in original.signature.outputs]
            service.score = ByTask(asked.scoring, names, run.details.get("outputs"))
        runner.start()
        endpoint = app.made(app.Endpoint(service, secret))

        def started() -> None:
            url = f"http://{asked.host}:{port}"
            say(f"Serving {run.name!r} at {url}/v2/models/{run.name}; the page is at {url}/")
            where = asked.token_file or asked.folder / "token"
            say(f"Token: {secret} (kept in {where})" if made else f"Token: in {where}")

        async def drain() -> None:
            service.draining = True
            await asyncio.gather(*(worker.stop(DRAIN_S) for worker in workers))

        await listening.listen(endpoint, asked.host, port, started, drain)
    finally:
        await runner.stop()
        if isinstance(service.score, ByTask):
            await service.score.end()
        await asyncio.gather(*(worker.stop() for worker in workers))
