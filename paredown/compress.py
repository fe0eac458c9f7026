"""Apply, check, measure, keep or undo: from a model and goals to an artifact that proves itself."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown import data, details, plan, progress, recipe, train
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.store import decode, encode
from paredown.ledger import Ledger, stage_key
from paredown.measure import Measured, compare, measure
from paredown.plan import Attempt, Recipe
from paredown.runtimes import runtime
from paredown.types import (
    SPLITS,
    Artifact,
    Comparison,
    Goals,
    Measurement,
    Run,
    Step,
    Target,
    Task,
    Trial,
    UserError,
    human,
)

MODEL = ".safetensors"
PAYS = {"size": 0.99, "memory": 0.97}  # a step pays below this share of the best so far
FASTER = 1.02  # and above this speed-up, if its interval excludes 1
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "safetensors")


@dataclass
class _State:
    """The best model so far and the files it is compared with."""

    ledger: Ledger
    task: Task
    goals: Goals
    target: Target
    original: Model
    original_file: Path
    baseline: Measurement
    seed: int


@dataclass
class _Best:
    """Where a recipe stands: the model kept so far, its stage, file, steps and measurement."""

    model: Model
    stage: str
    file: Path
    steps: list[Step]
    measurement: Measurement


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
        out: the run folder; the same call on the same folder goes on where it was interrupted.
            Default: a new folder under ``runs/``.
        seed: of every random choice.

    Returns:
        the Run that ``run.json`` and ``report.html`` in the folder tell of; ``run.met`` says
        whether every goal is met, and ``run.artifact`` is the best file either way.

    Raises:
        UserError: a problem with the model, the task, the goals or the folder; nothing is lost.
    """
    target = target or Target()
    folder = Path(out) if out else Path("runs") / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    captured = capture(model, task.example, task.dynamic)
    _refuse_problems(task, steps)
    identity, facts = _identity(captured, task, goals, target, steps, seed)
    with Ledger.open(folder, identity) as ledger, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = _baseline(ledger, captured, task, goals, target, seed)
        recipes = _recipes(state, steps)
        for note in captured.notes:
            progress.say(f"  note: {note}")
        trials, best = _try_recipes(state, recipes)
        run = _finish(state, best, trials, recipes, facts, command)
        details.write(run, folder, best.file, state.original_file)
    return run


def _refuse_problems(task: Task, steps: Sequence[Step] | None) -> None:
    lacking = task.missing({"validation", "test", "score"})
    found = [
        f"task: has no {name}; decisions need validation, the claim needs test." for name in lacking
    ]
    found += data.problems(task) + recipe.problems(steps or [], task)
    if found:
        raise UserError("\n".join(found))


def _identity(
    model: Model,
    task: Task,
    goals: Goals,
    target: Target,
    steps: Sequence[Step] | None,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's result depends on, and the facts about it that the report shows."""
    splits = {
        name: {
            "examples": data.size(getattr(task, name)),
            "fingerprint": data.fingerprint(getattr(task, name)),
        }
        for name in SPLITS
        if getattr(task, name) is not None
    }
    versions = {name: version(name) for name in (*PACKAGES, "paredown")}
    versions["python"] = platform.python_version()
    identity = {
        "model": hashlib.sha256(encode(model)).hexdigest(),
        "data": splits,
        "goals": dataclasses.asdict(goals),
        "target": dataclasses.asdict(target),
        "recipe": recipe.to_toml(steps) if steps else "",
        "seed": seed,
        "versions": versions,
    }
    return identity, {"data": splits, "versions": versions}


def _baseline(
    ledger: Ledger, model: Model, task: Task, goals: Goals, target: Target, seed: int
) -> _State:
    progress.say("Baseline: export the original and measure it")
    stage = ledger.put(encode(model), MODEL)
    file = _lowered(ledger, model, stage, target)
    key = stage_key({"baseline": stage})
    record = ledger.done(key)
    if record is None:
        measured = measure({"original": file}, model, task, target)["original"].measurement
        record = {"stage": stage, "suffix": MODEL, "measurement": dataclasses.asdict(measured)}
        ledger.finish(key, record)
    measurement = Measurement(**record["measurement"])
    progress.say(f"  {_figures(measurement)}")
    return _State(ledger, task, goals, target, model, file, measurement, seed)


def _lowered(ledger: Ledger, model: Model, stage: str, target: Target) -> Path:
    """The exported file of a stage, made once."""
    chosen = runtime(target.runtime)
    key = stage_key({"lower": stage, "runtime": target.runtime})
    record = ledger.done(key)
    if record is None:
        ledger.check_space(2 * sum(t.nbytes for t in model.state_dict().values()))
        path = chosen.lower(model, ledger.folder / f"lowering{chosen.SUFFIX}")
        sha256 = ledger.put(path.read_bytes(), chosen.SUFFIX)
        path.unlink()
        record = {"stage": sha256, "suffix": chosen.SUFFIX}
        ledger.finish(key, record)
    found = ledger.get(record["stage"], record["suffix"])
    assert found is not None
    return found


def _recipes(state: _State, steps: Sequence[Step] | None) -> list[Recipe]:
    if not state.goals.missed(state.baseline, state.baseline) and _has_goals(state.goals):
        progress.say("The original meets every goal already: nothing is changed.")
        return []
    if steps is not None:
        return [Recipe("as asked", "the recipe that was given", plan.attempts(steps))]
    recipes = plan.plan(state.original, state.task, state.goals, state.baseline)
    progress.say("Plan")
    for number, item in enumerate(recipes, 1):
        progress.say(f"  {number}. {item.title}: {item.reason}")
        for attempt in item.attempts:
            progress.say(f"     - {attempt.title}: {attempt.reason}; expected: {attempt.expected}")
    return recipes


def _has_goals(goals: Goals) -> bool:
    return any(getattr(goals, field.name) is not None for field in dataclasses.fields(goals))


def _try_recipes(state: _State, recipes: list[Recipe]) -> tuple[list[Trial], _Best]:
    """Each recipe from the original, until one meets the goals; the best of them otherwise."""
    start = _Best(state.original, "", state.original_file, [], state.baseline)
    trials: list[Trial] = []
    outcomes = [start]
    for item in recipes:
        progress.say(f"Recipe: {item.title}")
        found, best = _try_attempts(state, item.attempts, start)
        trials += found
        outcomes.append(best)
        if _has_goals(state.goals) and not state.goals.missed(best.measurement, state.baseline):
            return trials, best
        if not _has_goals(state.goals) and best is not start:
            return trials, best
    return trials, max(outcomes, key=lambda best: _rank(state, best.measurement))


def _rank(state: _State, measurement: Measurement) -> tuple[float, ...]:
    """Fewest goals missed, then the least excess over the bounds, then the smallest file."""
    checks = state.goals.check(measurement, state.baseline)
    missed = [check for check in checks if not check.met]
    excess = sum(_excess(check.goal, check.value, check.bound) for check in missed)
    return (-len(missed), -excess, -measurement.size_bytes)


def _excess(goal: str, value: float | None, bound: float) -> float:
    if value is None:
        return 1.0
    ratio = value / max(bound, 1e-12)
    return 1 / ratio - 1 if goal == "throughput" else ratio - 1


def _try_attempts(
    state: _State, attempts: Sequence[Attempt], start: _Best
) -> tuple[list[Trial], _Best]:
    best, trials = start, []
    for attempt in attempts:
        trial, best = _try(state, attempt, best)
        trials.append(trial)
        mark = "kept" if trial.kept else "undone"
        progress.say(f"  {attempt.title}: {mark}: {trial.decision}")
        if _has_goals(state.goals) and not state.goals.missed(best.measurement, state.baseline):
            break
    return trials, best


def _try(state: _State, attempt: Attempt, best: _Best) -> tuple[Trial, _Best]:
    """One attempt on top of the best so far; a finished one is taken from the ledger."""
    key = stage_key(
        {"after": best.stage, "steps": recipe.to_toml(attempt.steps), "seed": state.seed}
    )
    record = state.ledger.done(key)
    if record is None:
        progress.say(f"  {attempt.title} ({', '.join(recipe.line(s) for s in attempt.steps)})")
        record = _run_attempt(state, attempt, best, key)
        state.ledger.finish(key, record)
    trial = _trial(attempt, record)
    if not trial.kept or trial.measurement is None:
        return trial, best
    path = state.ledger.get(record["stage"], MODEL)
    assert path is not None
    model = decode(path.read_bytes(), str(path))
    file = _lowered(state.ledger, model, record["stage"], state.target)
    steps = [*best.steps, *attempt.steps]
    return trial, _Best(model, record["stage"], file, steps, trial.measurement)


def _run_attempt(state: _State, attempt: Attempt, best: _Best, key: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        model = _apply(state, attempt.steps, best, key)
        stage = state.ledger.put(encode(model), MODEL)
        file = _lowered(state.ledger, model, stage, state.target)
        files = {"original": state.original_file, "best": best.file, "candidate": file}
        measured = measure(files, state.original, state.task, state.target)
    except UserError as error:
        failed = {"kept": False, "decision": str(error), "measurement": None, "comparison": None}
        return {"stage": "", "suffix": "", "seconds": time.monotonic() - began, **failed}
    allowed = state.goals.allowed_drop(measured["original"].measurement)
    against_original = compare(measured["original"], measured["candidate"], allowed)
    against_best = compare(measured["best"], measured["candidate"], None)
    kept, decision = _decide(measured, against_original, against_best, allowed)
    return {
        "stage": stage,
        "suffix": MODEL,
        "seconds": time.monotonic() - began,
        "kept": kept,
        "decision": decision,
        "measurement": dataclasses.asdict(measured["candidate"].measurement),
        "comparison": dataclasses.asdict(against_original),
    }


def _apply(state: _State, steps: Sequence[Step], best: _Best, key: str) -> Model:
    """The attempt's steps, each finished one kept as a stage of its own."""
    model, done = best.model, []
    for step in steps:
        done.append(step)
        partial = stage_key({"partial": key, "steps": recipe.to_toml(done)})
        record = state.ledger.done(partial)
        path = state.ledger.get(record["stage"], MODEL) if record else None
        if path is not None:
            model = decode(path.read_bytes(), str(path))
            continue
        scratch = state.ledger.folder / "scratch" / partial
        scratch.mkdir(parents=True, exist_ok=True)
        token = train.scratch.set(scratch)
        try:
            torch.manual_seed(state.seed)
            model = recipe.apply_step(model, step, state.task)
        finally:
            train.scratch.reset(token)
        state.ledger.finish(
            partial, {"stage": state.ledger.put(encode(model), MODEL), "suffix": MODEL}
        )
        _empty(scratch)
    return model


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _decide(
    measured: dict[str, Measured],
    against_original: Comparison,
    against_best: Comparison,
    allowed: float | None,
) -> tuple[bool, str]:
    """Keep what pays on the exported file and stays within the allowed drop."""
    best, candidate = measured["best"].measurement, measured["candidate"].measurement
    drop = -(against_original.score_difference or 0.0)
    if allowed is not None and drop > allowed + 1e-12:
        unit = 100 if candidate.score_in_points else 1
        word = " points" if candidate.score_in_points else ""
        return (
            False,
            f"the score fell by {drop * unit:.3g}{word}; the goal allows {allowed * unit:.3g}",
        )
    size = candidate.size_bytes / best.size_bytes
    sizes = f"size {_change('size', best, candidate)} ({size:.2f}x)"
    faster = (against_best.speedup or 1) >= FASTER and (against_best.speedup_low or 0) > 1
    lighter = (
        candidate.memory_bytes is not None
        and best.memory_bytes is not None
        and candidate.memory_bytes / best.memory_bytes <= PAYS["memory"]
    )
    if size <= PAYS["size"] or faster:
        return True, f"{sizes}, {against_best.speed}"
    if lighter:
        memory = _change("memory", best, candidate)
        return True, f"peak memory {memory}; {sizes}, {against_best.speed}"
    return False, f"it does not pay in the exported file: {sizes}, {against_best.speed}"


def _change(goal: str, before: Measurement, after: Measurement) -> str:
    return " to ".join(human(goal, m.quantity(goal) or 0.0) for m in (before, after))


def _trial(attempt: Attempt, record: dict[str, Any]) -> Trial:
    measurement, comparison = record["measurement"], record["comparison"]
    return Trial(
        steps=[recipe.line(step) for step in attempt.steps],
        title=attempt.title,
        reason=attempt.reason,
        expected=attempt.expected,
        kept=record["kept"],
        decision=record["decision"],
        measurement=Measurement(**measurement) if measurement else None,
        comparison=Comparison(**comparison) if comparison else None,
        seconds=record["seconds"],
        stage=record["stage"],
    )


def _figures(m: Measurement) -> str:
    parts = [human("size", m.size_bytes)]
    if m.score is not None:
        parts.append(f"score {m.score:.2%}" if m.score_in_points else f"score {m.score:.4g}")
    if m.latency_ms_p50 is not None:
        parts.append(f"{human('latency', m.latency_ms_p50)} median")
    if m.memory_bytes is not None:
        parts.append(f"{human('memory', m.memory_bytes)} peak memory")
    return ", ".join(parts)


def _finish(
    state: _State,
    best: _Best,
    trials: list[Trial],
    recipes: list[Recipe],
    facts: dict[str, Any],
    command: str,
) -> Run:
    """The claim: original and artifact on the test split, which no decision has seen."""
    progress.say("Proof: the exported file beside the original, on the test split")
    files = {"original": state.original_file, "compressed": best.file}
    measured = measure(files, state.original, state.task, state.target, split="test")
    original, compressed = measured["original"], measured["compressed"]
    allowed = state.goals.allowed_drop(original.measurement)
    comparison = compare(original, compressed, allowed)
    checks = state.goals.check(compressed.measurement, original.measurement)
    met = all(check.met for check in checks)
    return Run(
        name=state.ledger.folder.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        goals=dataclasses.asdict(state.goals),
        target=dataclasses.asdict(state.target),
        versions=facts["versions"],
        data=facts["data"],
        seed=state.seed,
        plan=[_plan_row(item) for item in recipes],
        baseline=state.baseline,
        trials=trials,
        artifact=_artifact(state, best.file, best.steps, "model"),
        original=_artifact(state, state.original_file, [], "original"),
        on_device={"original": original.measurement, "compressed": compressed.measurement},
        comparison=comparison,
        checks=checks,
        met=met,
        verdict=_verdict(met, [c.sentence for c in checks if not c.met], bool(best.steps)),
        details=details.collect(
            state.original, best.model, state.task, measured, best.file, state.target
        ),
    )


def _plan_row(item: Recipe) -> dict[str, Any]:
    return {
        "title": item.title,
        "reason": item.reason,
        "expected": "; ".join(a.expected for a in item.attempts if a.expected),
        "steps": [recipe.line(step) for step in item.steps],
    }


def _artifact(state: _State, file: Path, steps: Sequence[Step], name: str) -> Artifact:
    raw = file.read_bytes()
    return Artifact(
        path=f"{name}{file.suffix}",
        runtime=state.target.runtime,
        sha256=hashlib.sha256(raw).hexdigest(),
        size_bytes=len(raw),
        recipe=recipe.to_toml(steps),
    )


def _verdict(met: bool, missed: list[str], changed: bool) -> str:
    if met and changed:
        return "Every goal is met by the exported file."
    if met:
        return "The original meets every goal already; nothing was changed."
    kept = "The best file is kept." if changed else "No step paid; the original is kept."
    return f"Goals missed. {' '.join(missed)} {kept}"


def replay(
    folder: str | Path, model: nn.Module | Model | str | Path, task: Task
) -> tuple[Artifact, str]:
    """Make a run's artifact again from its recipe: the artifact as kept, and the new SHA-256.

    Raises:
        UserError: the folder holds no finished run, or model or data are not those of the run.
    """
    folder = Path(folder)
    run = load_run(folder)
    assert run.artifact is not None
    captured = capture(model, task.example, task.dynamic)
    for name, facts in run.data.items():
        if data.fingerprint(data.split(task, name)) != facts["fingerprint"]:
            raise UserError(f"{folder}: the {name} split is not the one of the run.")
    with torch.random.fork_rng(devices=[]):
        for step in recipe.from_toml(run.artifact.recipe, "the run's recipe"):
            torch.manual_seed(run.seed)
            progress.say(f"  {recipe.line(step)}")
            # through the stored form, as a run that was interrupted would go
            captured = decode(encode(recipe.apply_step(captured, step, task)), "replay")
        chosen = runtime(run.artifact.runtime)
        path = chosen.lower(captured, folder / f"replay{chosen.SUFFIX}")
    return run.artifact, hashlib.sha256(path.read_bytes()).hexdigest()


def load_run(folder: str | Path) -> Run:
    """The Run of a run folder.

    Raises:
        UserError: no finished run there.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run (no run.json).")
    try:
        return Run.from_json(path.read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: is damaged: {error}.") from error
