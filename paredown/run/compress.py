"""Apply, check, measure, keep or undo: from a model and goals to an artifact that proves itself."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.results import Run, Trial
from paredown.core.settings import check_arguments, check_seed
from paredown.core.source import Source
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.explain.explanation import within_run
from paredown.graph import machine
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.measure.measure import Measured, compare
from paredown.run import details, fidelity, golden
from paredown.run.conditions import same_conditions
from paredown.run.folder import artifact, write
from paredown.run.identity import identity_of, ignore_of, question_of, recorded
from paredown.run.ledger import RUN, Ledger, finished_key, stage_key
from paredown.run.outcome import in_reach, useless_file, verdict
from paredown.run.preflight import problems
from paredown.run.stages import Point, State, begun, proof, tried
from paredown.run.students import Students
from paredown.run.yardsticks import check_yardsticks
from paredown.search import decide, plan
from paredown.search.proposal import Proposal
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
    source: Source | None = None,
) -> Run:
    """Pare a model down to its goals and prove it on the exported file.

    Args:
        model: what `capture` takes.
        steps: a recipe of one's own; by default the plan's recipes are tried in order.
        out: the run folder; the same call on the same folder goes on where it was interrupted, and
            returns the same Run where it was finished; with other goals it asks them of what is
            finished there. Default: a folder under ``runs/`` that is named after everything the run
            depends on.
        seed: of every random choice.
        command, source: what the run was started by, and from, for the record.

    Returns:
        the Run that ``run.json`` and ``report.html`` in the folder tell of; ``run.met`` says
        whether every goal is met, and ``run.artifact`` is the best file either way.

    Raises:
        UserError: a problem with the model, the task, the goals or the folder; nothing is lost.
    """
    check_seed("seed", seed)
    check_arguments(task=(task, Task), goals=(goals, Goals), target=(target, Target | None))
    check_arguments(out=(out, str | Path | None), command=(command, str))
    check_arguments(source=(source, Source | None))
    steps = None if steps is None else recipe.checked(steps)
    target, task = target or Target(), splits.prepared(task)
    with machine.free_threads():
        captured = capture(model, task.example, task.dynamic)
        found = problems(captured, task, target, steps or [])
        if found:
            raise UserError("\n".join(found))
        students = Students.of(steps, task)
        digests, (named, _) = students.digests(steps, task), students.named(steps, task)
        identity = identity_of(captured, task, target, seed)
        question = question_of(goals, named, digests)
        folder = Path(out) if out else Path("runs") / stage_key(identity | question)[:12]
        with Ledger.open(folder, identity) as ledger, same_conditions(ledger, seed) as threads:
            check_yardsticks(ledger, captured, task)
            key = finished_key(question)
            run = _finished(ledger, key)
            if run is None:
                students.write(folder)
                steps, task = students.named(steps, task, folder)
                state = begun(ledger, captured, task, goals, target, seed, steps)
                asked = identity | question | {"finished": key, "threads": threads}
                asked |= {"command": command, "source": recorded(source, task)}
                text = _run(state, steps, asked).to_json()
                run = Run.from_json(text)  # as a later call finds it
                ledger.finish(key, {"stage": ledger.put(text.encode(), RUN), "suffix": RUN})
            shutil.rmtree(folder / "scratch", ignore_errors=True)
            shipped, before = _files(ledger, run)
            return write(run, folder, shipped, before, _golden(ledger, run))


def _finished(ledger: Ledger, key: str) -> Run | None:
    """The Run of a folder whose run for this question is finished and whole."""
    record = ledger.done(key)
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


def _golden(ledger: Ledger, run: Run) -> Path | None:
    """The run's golden set, as far as it has one that is whole."""
    kept = run.details.get("golden")
    return ledger.get(kept["sha256"], golden.SUFFIX) if kept else None


def _proposals(state: State, steps: Sequence[Step] | None) -> list[Proposal]:
    if state.done(state.start):
        progress.say("The original meets every goal already: nothing is changed.")
        return []
    if steps is not None:
        return [plan.as_asked(steps)]
    proposals = plan.plan(
        state.original, state.task, state.steering, state.baseline, state.seed, state.target
    )
    progress.say("Plan")
    for number, item in enumerate(proposals, 1):
        progress.say(f"  {number}. {item.title}: {item.reason}")
        for attempt in item.attempts:
            expected = f"; expected: {attempt.expected}" if attempt.expected else ""
            progress.say(f"     - {attempt.title}: {attempt.reason}{expected}")
    return proposals


def _search(state: State, proposals: list[Proposal]) -> tuple[list[Trial], Point]:
    """Each proposal from the original, until one meets the goals; and of everything that was
    measured on the way what comes nearest to them.

    Where no amount is asked for, the first proposal that pays is enough.
    """
    start = Point("", state.original_file, (), state.start)
    bounded = decide.asks(state.steering)
    trials: list[Trial] = []
    points = [start]
    for item in proposals:
        progress.say(f"Recipe: {item.title}")
        best = _try_attempts(state, item, start, trials, points)
        if best is not start and not bounded:
            return trials, best
        if state.done(best.standing):
            break
    ranked = [(decide.rank(state.steering, each.standing, state.baseline), each) for each in points]
    return trials, max(reversed(ranked), key=lambda each: each[0])[1]


def _try_attempts(
    state: State, item: Proposal, start: Point, trials: list[Trial], points: list[Point]
) -> Point:
    """Where the recipe ends; what is tried and measured on the way goes into the two lists."""
    best, undone, told = start, tuple[Step, ...](), False
    for attempt in item.attempts:
        if best is not start and state.done(best.standing):
            progress.say(f"  Every goal is met, so {attempt.title} is not needed.")
            break
        if undone and attempt.steps == undone:  # on the same file they would do the same
            if not told:
                progress.say("  The same steps again are left out: they would be undone again.")
            told = True
            continue
        trial, point = tried(state, item, attempt, best, len(trials) + 1)
        trials.append(trial)
        if point is not None:
            points.append(point)
        best = point if point is not None and trial.kept else best
        undone, told = () if trial.kept else attempt.steps, False
        mark = "kept" if trial.kept else "undone"
        progress.say(f"  {attempt.title}: {mark}: {trial.decision}")
        if trial.kept and state.unproven(best.standing):
            progress.say(f"  {state.unproven(best.standing)}")
    return best


def _shipped(trials: Sequence[Trial], best: Point) -> list[Trial]:
    """The trials, each with whether its steps are in the artifact."""
    found = []
    for number, trial in enumerate(trials, 1):
        if number in best.trials:
            if not trial.kept:
                words = f"{trial.decision}; yet nothing that was measured comes nearer to the goals"
                trial = replace(trial, kept=True, decision=words)
            trial = replace(trial, shipped=True)
        found.append(trial)
    return found


def _run(state: State, steps: Sequence[Step] | None, asked: dict[str, Any]) -> Run:
    """All proposals, and then the claim: on the test split, which no decision has seen."""
    proposals = _proposals(state, steps)
    trials, best = _search(state, proposals)
    progress.say("Proof: the exported file beside the original, on the test split")
    measured = proof(state, best)
    original, compressed = measured["original"], measured["compressed"]
    allowed = state.goals.allowed_drop(original.measurement)
    compared = compare(original, compressed, allowed, tails=True)
    figures = compressed.measurement, original.measurement
    # the original itself loses nothing, which no data have to prove
    checks = state.goals.check(*figures, state.baseline, compared if best.stage else None)
    useless = useless_file(state, measured)
    told = fidelity.facts(state, best, compressed) if best.steps else None
    said = " ".join(filter(None, [fidelity.sentence(told), useless]))
    went_on = bool(trials) and bool(state.unproven(best.standing))  # for the want of a proof alone
    return Run(
        name=state.ledger.folder.absolute().name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=asked["command"],
        goals=asked["goals"],
        target=asked["target"],
        versions=asked["versions"],
        data=asked["data"],
        seed=state.seed,
        plan=[plan_row(item) for item in proposals],
        baseline=state.baseline,
        trials=_shipped(trials, best),
        artifact=artifact("model", best.file, best.steps, state.target),
        original=artifact("original", state.original_file, [], state.target),
        on_device={name: each.measurement for name, each in measured.items()},
        comparison=compared,
        checks=checks,
        met=all(check.met for check in checks),
        verdict=verdict(checks, bool(best.steps), bool(trials), compared, said, went_on),
        details={
            **{name: asked[name] for name in ("batch_size", "finished", "threads", "source")},
            "model_sha256": asked["model"],
            "useless": useless,
            "fidelity": told,
            **_details(state, trials, best, measured),
        },
    )


def _details(
    state: State, trials: Sequence[Trial], best: Point, measured: dict[str, Measured]
) -> dict[str, Any]:
    """What there is to say of the artifact besides its figures."""
    model = best.model(state)
    made = state.original, model, state.task, measured, best.file, state.target
    return {
        "outputs": state.original.outputs,
        **ignore_of(state.task),
        "files": recipe.contents(best.steps, state.task),
        "stage_sha256": best.stage,
        "packed_bytes": _packed(state, best),
        "in_reach": in_reach(state, trials, best),
        "golden": golden.keep(state.ledger, state.original, state.task, best.file, state.target),
        **details.collect(*made),
        "explanation": _explanation(state, best, model, sum(trial.seconds for trial in trials)),
    }


def _packed(state: State, best: Point) -> dict[str, int] | None:
    """What both files take once they are packed, of a recipe that was asked for."""
    if not (state.asked and best.steps):
        return None
    files = {"original": state.original_file, "compressed": best.file}
    return {name: packed_bytes(file) for name, file in files.items()}


def _explanation(state: State, best: Point, model: Model, took_s: float) -> dict[str, Any] | None:
    """Where the score went, in a tenth of the time that the trials took, or 20 s at most."""
    if not best.steps:
        return None
    seconds = min(LONGEST_EXPLANATION_S, took_s / 10)
    made = state.original, model, best.file, state.target.runtime
    return within_run(*made, state.task, best.steps, seconds)


def plan_row(item: Proposal) -> dict[str, Any]:
    return {
        "title": item.title,
        "reason": item.reason,
        "expected": "; ".join(a.expected for a in item.attempts if a.expected),
        "steps": [recipe.line(step) for step in item.steps],
    }
