"""Apply, check, measure, keep or undo: from a model and goals to an artifact that proves itself."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck, Goals
from paredown.core.results import Run, Trial
from paredown.core.settings import check_seed
from paredown.core.task import Target, Task
from paredown.core.units import GOALS
from paredown.data import splits
from paredown.explain.explanation import within_run
from paredown.graph import machine
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure.measure import compare, measure
from paredown.run import details
from paredown.run.folder import artifact, write
from paredown.run.identity import identity_of, ignore_of
from paredown.run.ledger import FINISHED, RUN, Ledger, stage_key
from paredown.run.preflight import problems
from paredown.run.stages import Best, State, begun, tried
from paredown.search import decide, plan
from paredown.search.proposal import Attempt, Proposal
from paredown.ship.pack.container import packed_bytes
from paredown.steps import recipe
from paredown.steps.step import Step

LONGEST_EXPLANATION_S = 20.0


def compress(
    model: nn.Module | Model | str | Path,
    task: Task,
    goals: Goals,
    target: Target | None = None,
    steps: Sequence[Step] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    command: str = "",
) -> Run:
    """Pare a model down to its goals and prove it on the exported file.

    Args:
        model: what `capture` takes.
        steps: a recipe of one's own; by default the plan's recipes are tried in order.
        out: the run folder; the same call on the same folder goes on where it was interrupted, and
            returns the same Run where it was finished. Default: a folder under ``runs/`` that is
            named after everything the run depends on.
        seed: of every random choice.

    Returns:
        the Run that ``run.json`` and ``report.html`` in the folder tell of; ``run.met`` says
        whether every goal is met, and ``run.artifact`` is the best file either way.

    Raises:
        UserError: a problem with the model, the task, the goals or the folder; nothing is lost.
    """
    check_seed("seed", seed)
    target, task = target or Target(), splits.prepared(task)
    captured = capture(model, task.example, task.dynamic)
    found = problems(captured, task, target, steps or [])
    if found:
        raise UserError("\n".join(found))
    identity = identity_of(captured, task, goals, target, steps, seed)
    folder = Path(out) if out else Path("runs") / stage_key(identity)[:12]
    with Ledger.open(folder, identity) as ledger, machine.same_numbers(seed):
        run = _finished(ledger)
        if run is None:
            state = begun(ledger, captured, task, goals, target, seed, steps is not None)
            text = _run(state, steps, identity, command).to_json()
            run = Run.from_json(text)  # as a later call finds it
            ledger.finish(FINISHED, {"stage": ledger.put(text.encode(), RUN), "suffix": RUN})
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        return write(run, folder, *_files(ledger, run))


def _finished(ledger: Ledger) -> Run | None:
    """The Run of a folder whose run is finished and whole."""
    record = ledger.done(FINISHED)
    path = ledger.get(record["stage"], RUN) if record else None
    run = Run.from_json(path.read_text()) if path else None
    if run is None or len(_files(ledger, run)) < 2:
        return None
    progress.say(f"This run is finished: {run.verdict}")
    return run


def _files(ledger: Ledger, run: Run) -> list[Path]:
    """The exported artifact and original, as far as they are whole."""
    artifacts = [item for item in (run.artifact, run.original) if item is not None]
    found = [ledger.get(item.sha256, Path(item.path).suffix) for item in artifacts]
    return [path for path in found if path is not None]


def _proposals(state: State, steps: Sequence[Step] | None) -> list[Proposal]:
    if state.done(state.start):
        progress.say("The original meets every goal already: nothing is changed.")
        return []
    if steps is not None:
        return [plan.as_asked(steps)]
    proposals = plan.plan(
        state.original, state.task, state.goals, state.baseline, state.seed, state.target
    )
    progress.say("Plan")
    for number, item in enumerate(proposals, 1):
        progress.say(f"  {number}. {item.title}: {item.reason}")
        for attempt in item.attempts:
            progress.say(f"     - {attempt.title}: {attempt.reason}; expected: {attempt.expected}")
    return proposals


def _try_proposals(state: State, proposals: list[Proposal]) -> tuple[list[Trial], Best]:
    """Each proposal from the original, until one meets the goals; the best of them otherwise.

    Where no amount is asked for, the first proposal that pays is enough.
    """
    start = Best(state.original, "", state.original_file, [], state.start)
    bounded = any(getattr(state.goals, goal) is not None for goal in GOALS)
    trials: list[Trial] = []
    outcomes = [start]
    for item in proposals:
        progress.say(f"Recipe: {item.title}")
        found, best = _try_attempts(state, item.attempts, start)
        trials += found
        outcomes.append(best)
        if state.done(best.standing) or (best is not start and not bounded):
            return trials, best
    return trials, max(outcomes, key=lambda each: _rank(state, each))


def _rank(state: State, best: Best) -> tuple[float, ...]:
    return decide.rank(state.goals, best.standing, state.baseline)


def _try_attempts(
    state: State, attempts: Sequence[Attempt], start: Best
) -> tuple[list[Trial], Best]:
    best = start
    trials: list[Trial] = []
    for attempt in attempts:
        if trials and state.done(best.standing):
            progress.say(f"  Every goal is met, so {attempt.title} is not needed.")
            break
        trial, best = tried(state, attempt, best)
        trials.append(trial)
        mark = "kept" if trial.kept else "undone"
        progress.say(f"  {attempt.title}: {mark}: {trial.decision}")
    return trials, best


def _run(state: State, steps: Sequence[Step] | None, identity: dict[str, Any], command: str) -> Run:
    """All proposals, and then the claim: on the test split, which no decision has seen."""
    proposals = _proposals(state, steps)
    trials, best = _try_proposals(state, proposals)
    progress.say("Proof: the exported file beside the original, on the test split")
    files = {"original": state.original_file, "compressed": best.file}
    measured = measure(files, state.original, state.task, state.target, split="test")
    original, compressed = measured["original"], measured["compressed"]
    allowed = state.goals.allowed_drop(original.measurement)
    checks = state.goals.check(compressed.measurement, original.measurement, state.baseline)
    return Run(
        name=state.ledger.folder.absolute().name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        goals=identity["goals"],
        target=identity["target"],
        versions=identity["versions"],
        data=identity["data"],
        seed=state.seed,
        plan=[plan_row(item) for item in proposals],
        baseline=state.baseline,
        trials=trials,
        artifact=artifact("model", best.file, best.steps, state.target),
        original=artifact("original", state.original_file, [], state.target),
        on_device={name: each.measurement for name, each in measured.items()},
        comparison=compare(original, compressed, allowed),
        checks=checks,
        met=all(check.met for check in checks),
        verdict=verdict(checks, bool(best.steps), bool(trials)),
        details={
            "model_sha256": identity["model"],
            "batch_size": identity["batch_size"],
            "outputs": state.original.outputs,
            **ignore_of(state.task),
            "files": identity["files"],
            "stage_sha256": best.stage,
            "packed_bytes": _packed(state, best),
            **details.collect(
                state.original, best.model, state.task, measured, best.file, state.target
            ),
            "explanation": _explanation(state, best, sum(trial.seconds for trial in trials)),
        },
    )


def _packed(state: State, best: Best) -> dict[str, int] | None:
    """What both files take once they are packed, of a recipe that was asked for."""
    if not (state.asked and best.steps):
        return None
    files = {"original": state.original_file, "compressed": best.file}
    return {name: packed_bytes(file) for name, file in files.items()}


def _explanation(state: State, best: Best, took_s: float) -> dict[str, Any] | None:
    """Where the score went, in a tenth of the time that the trials took, or 20 s at most."""
    if not best.steps:
        return None
    seconds = min(LONGEST_EXPLANATION_S, took_s / 10)
    made = state.original, best.model, best.file, state.target.runtime
    return within_run(*made, state.task, best.steps, seconds)


def plan_row(item: Proposal) -> dict[str, Any]:
    return {
        "title": item.title,
        "reason": item.reason,
        "expected": "; ".join(a.expected for a in item.attempts if a.expected),
        "steps": [recipe.line(step) for step in item.steps],
    }


def verdict(checks: Sequence[GoalCheck], changed: bool, tried: bool) -> str:
    """The outcome in a sentence or two; every missed goal is named, and a drift of the machine."""
    drifted = "".join(f" {check.drifted}" for check in checks if check.drifted)
    missed = [check.sentence for check in checks if not check.met]
    kept = "The best file is kept." if changed else "No step paid; the original is kept."
    if missed:
        return f"Goals missed. {' '.join(missed)}{drifted} {kept}"
    if not tried:
        return "The original meets every goal already; nothing was changed."
    if not checks:
        return f"No goal was set. {kept}"
    return f"Every goal is met by the exported file.{drifted}" + ("" if changed else f" {kept}")
