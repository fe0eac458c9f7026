"""Apply, check, measure, keep or undo: from a model and goals to an artifact that proves itself."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paredown import data, details, findings, plan, progress, recipe, train
from paredown.check import problems
from paredown.explain.explanation import within_run
from paredown.graph.capture import capture
from paredown.graph.model import Model
from paredown.graph.store import decode, encode
from paredown.ledger import FINISHED, MODEL, RUN, Ledger, stage_key
from paredown.measure import Measured, compare, measure
from paredown.offers import Attempt, Recipe
from paredown.pack import packed_bytes
from paredown.runtimes import digest, parts, ready, runtime
from paredown.teacher import started_from
from paredown.types import (
    GOALS,
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

LONGEST_EXPLANATION_S = 20.0
PACKAGES = ("torch", "numpy", "safetensors", "paredown")  # and those of the runtime


@dataclass
class _State:
    """What stays the same through a run: what was asked, the original, and where work is kept."""

    ledger: Ledger
    task: Task
    goals: Goals
    target: Target
    original: Model
    original_file: Path
    baseline: Measurement
    seed: int
    asked: bool  # for a recipe of the user's own

    def done(self, measurement: Measurement) -> bool:
        """Whether there is nothing left to do: an amount was asked for, and every goal is met."""
        asked = any(getattr(self.goals, goal) is not None for goal in GOALS)
        return asked and not self.goals.missed(measurement, self.baseline)


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
    target = target or Target()
    captured = capture(model, task.example, task.dynamic)
    found = problems(captured, task, target, steps or [])
    if found:
        raise UserError("\n".join(found))
    identity = _identity(captured, task, goals, target, steps, seed)
    folder = Path(out) if out else Path("runs") / stage_key(identity)[:12]
    with Ledger.open(folder, identity) as ledger, torch.random.fork_rng(devices=[]):
        run = _finished(ledger)
        if run is None:
            torch.manual_seed(seed)
            state = _baseline(ledger, captured, task, goals, target, seed, steps is not None)
            text = _run(state, steps, identity, command).to_json()
            run = Run.from_json(text)  # as a later call finds it
            ledger.finish(FINISHED, {"stage": ledger.put(text.encode(), RUN), "suffix": RUN})
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        details.write(run, folder, *_files(ledger, run))
    return run


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


def _identity(
    model: Model,
    task: Task,
    goals: Goals,
    target: Target,
    steps: Sequence[Step] | None,
    seed: int,
) -> dict[str, Any]:
    """What a run's result depends on."""
    splits = {name: getattr(task, name) for name in SPLITS if getattr(task, name) is not None}
    return {
        "model": _digest(model),
        "data": {
            name: {"examples": data.size(split), "fingerprint": data.fingerprint(split)}
            for name, split in splits.items()
        },
        "batch_size": task.batch_size,
        "goals": dataclasses.asdict(goals),
        "target": dataclasses.asdict(target),
        "recipe": recipe.to_toml(steps) if steps else "",
        "files": recipe.files(steps or []),
        "seed": seed,
        "versions": versions(target.runtime),
    }


def _digest(model: Model) -> str:
    return hashlib.sha256(encode(model)).hexdigest()


def versions(name: str) -> dict[str, str]:
    """Of Python and of the packages that a result depends on in the runtime of that name.

    Example:
        >>> sorted(versions("pytorch"))
        ['numpy', 'paredown', 'python', 'safetensors', 'torch']
    """
    packages = dict.fromkeys((*PACKAGES, *ready(name).PACKAGES))
    return {each: version(each) for each in packages} | {"python": platform.python_version()}


def _baseline(
    ledger: Ledger,
    model: Model,
    task: Task,
    goals: Goals,
    target: Target,
    seed: int,
    asked: bool,
) -> _State:
    progress.say("Baseline: export the original and measure it")
    stage = ledger.put(encode(model), MODEL)
    _check_space(ledger, model)
    file = _lowered(ledger, model, stage, target)
    key = stage_key({"baseline": stage})
    record = ledger.done(key)
    if record is None:
        measured = measure({"original": file}, model, task, target)["original"].measurement
        record = {"stage": stage, "suffix": MODEL, "measurement": dataclasses.asdict(measured)}
        ledger.finish(key, record)
    measurement = Measurement(**record["measurement"])
    progress.say(f"  {_figures(measurement)}")
    for note in model.notes:
        progress.say(f"  note: {note}")
    return _State(ledger, task, goals, target, model, file, measurement, seed, asked)


def _check_space(ledger: Ledger, model: Model) -> None:
    """Room for what the next step keeps: each of its models, a checkpoint, the exported file."""
    ledger.check_space(6 * sum(tensor.nbytes for tensor in model.state_dict().values()))


def _lowered(ledger: Ledger, model: Model, stage: str, target: Target) -> Path:
    """The exported file of a stage, made once."""
    chosen = runtime(target.runtime)
    key = stage_key({"lower": stage, "runtime": target.runtime})
    record = ledger.done(key)
    if record is None:
        path = chosen.lower(model, ledger.folder / f"lowering{chosen.SUFFIX}")
        sha256 = ledger.keep(path)
        for part in parts(path):
            part.unlink()
        record = {"stage": sha256, "suffix": chosen.SUFFIX}
        ledger.finish(key, record)
    found = ledger.get(record["stage"], record["suffix"])
    assert found is not None
    return found


def _recipes(state: _State, steps: Sequence[Step] | None) -> list[Recipe]:
    if state.done(state.baseline):
        progress.say("The original meets every goal already: nothing is changed.")
        return []
    if steps is not None:
        return [Recipe("as asked", "the recipe that was given", plan.attempts(steps))]
    recipes = plan.plan(
        state.original, state.task, state.goals, state.baseline, state.seed, state.target
    )
    progress.say("Plan")
    for number, item in enumerate(recipes, 1):
        progress.say(f"  {number}. {item.title}: {item.reason}")
        for attempt in item.attempts:
            progress.say(f"     - {attempt.title}: {attempt.reason}; expected: {attempt.expected}")
    return recipes


def _try_recipes(state: _State, recipes: list[Recipe]) -> tuple[list[Trial], _Best]:
    """Each recipe from the original, until one meets the goals; the best of them otherwise.

    Where no amount is asked for, the first recipe that pays is enough.
    """
    start = _Best(state.original, "", state.original_file, [], state.baseline)
    bounded = any(getattr(state.goals, goal) is not None for goal in GOALS)
    trials: list[Trial] = []
    outcomes = [start]
    for item in recipes:
        progress.say(f"Recipe: {item.title}")
        found, best = _try_attempts(state, item.attempts, start)
        trials += found
        outcomes.append(best)
        if state.done(best.measurement) or (best is not start and not bounded):
            return trials, best
    return trials, max(outcomes, key=lambda each: _rank(state, each))


def _rank(state: _State, best: _Best) -> tuple[float, ...]:
    return plan.rank(state.goals, best.measurement, state.baseline)


def _try_attempts(
    state: _State, attempts: Sequence[Attempt], start: _Best
) -> tuple[list[Trial], _Best]:
    best = start
    trials: list[Trial] = []
    for attempt in attempts:
        if trials and state.done(best.measurement):
            progress.say(f"  Every goal is met, so {attempt.title} is not needed.")
            break
        trial, best = _try(state, attempt, best)
        trials.append(trial)
        mark = "kept" if trial.kept else "undone"
        progress.say(f"  {attempt.title}: {mark}: {trial.decision}")
    return trials, best


def _try(state: _State, attempt: Attempt, best: _Best) -> tuple[Trial, _Best]:
    """One attempt on top of the best so far; a finished one is taken from the ledger."""
    key = stage_key(
        {"after": best.stage, "steps": recipe.to_toml(attempt.steps), "seed": state.seed}
    )
    record = state.ledger.done(key)
    if record is None:
        progress.say(f"  {attempt.title} ({', '.join(recipe.line(s) for s in attempt.steps)})")
        _check_space(state.ledger, best.model)
        record = _run_attempt(state, attempt, best, key)
        state.ledger.finish(key, record)
    trial = _trial(attempt, record)
    if not trial.kept or trial.measurement is None:
        return trial, best
    model = _stored(state.ledger, record["stage"])
    file = _lowered(state.ledger, model, record["stage"], state.target)
    steps = [*best.steps, *recipe.from_toml(record["recipe"])]
    return trial, _Best(model, record["stage"], file, steps, trial.measurement)


def _run_attempt(state: _State, attempt: Attempt, best: _Best, key: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        stage, settled, found = _apply(state, attempt.steps, best, key)
        file = _lowered(state.ledger, _stored(state.ledger, stage), stage, state.target)
        files = {"original": state.original_file, "candidate": file}
        if best.stage:  # else the best so far is the original
            files["best"] = best.file
        measured = measure(files, state.original, state.task, state.target)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # the disk's fault, not the step's
            raise
        failed = {"kept": False, "decision": str(error), "measurement": None, "comparison": None}
        failed |= {"findings": []}
        asked = {"stage": "", "suffix": "", "recipe": recipe.to_toml(attempt.steps)}
        return {**asked, "seconds": time.monotonic() - began, **failed}
    allowed = state.goals.allowed_drop(measured["original"].measurement)
    against_original = compare(measured["original"], measured["candidate"], allowed)
    kept, decision = plan.decide(measured, allowed)
    if not kept and state.asked and not _fell(measured, allowed):
        kept, decision = _pays_packed(best.file, file, decision)
    return {
        "stage": stage,
        "suffix": MODEL,
        "recipe": settled,
        "seconds": time.monotonic() - began,
        "kept": kept,
        "decision": decision,
        "measurement": dataclasses.asdict(measured["candidate"].measurement),
        "comparison": dataclasses.asdict(against_original),
        "findings": found,
    }


def _fell(measured: dict[str, Measured], allowed: float | None) -> bool:
    """Whether the score fell by more than the goal allows."""
    before, after = (measured[name].measurement.score or 0.0 for name in ("original", "candidate"))
    return allowed is not None and before - after > allowed + 1e-12


def _pays_packed(best: Path, candidate: Path, decision: str) -> tuple[bool, str]:
    """Zeros and shared values make an exported file smaller only once it is packed: of a recipe
    that was asked for they are kept for that, by the same bound."""
    before, after = packed_bytes(best), packed_bytes(candidate)
    change = f"{human('size', before)} to {human('size', after)} ({after / before:.2f}x)"
    if after <= plan.PAYS["size"] * before:
        return True, f"packed for delivery {change}; {decision}"
    return False, f"{decision}; nor packed for delivery: {change}"


def _apply(
    state: _State, steps: Sequence[Step], best: _Best, key: str
) -> tuple[str, str, list[dict[str, Any]]]:
    """The stage after the attempt's steps, each finished one being a stage of its own; the steps
    as settled, in TOML; and what they found out.

    Every step begins from the stored form, so that an interrupted run takes the same way.
    """
    stage, settled = "", []
    noted: list[dict[str, Any]] = []
    for count, step in enumerate(steps, 1):
        partial = stage_key({"partial": key, "steps": recipe.to_toml(steps[:count])})
        record = state.ledger.done(partial)
        scratch = state.ledger.folder / "scratch" / partial
        if record is None:
            model = _stored(state.ledger, stage) if stage else best.model
            with findings.collected() as found:
                step = recipe.settle(step, model, state.task, state.target)
                made = _apply_step(state, model, step, scratch)
            record = {"stage": state.ledger.put(encode(made), MODEL), "suffix": MODEL}
            record |= {"recipe": recipe.to_toml([step]), "findings": found}
            state.ledger.finish(partial, record)
        shutil.rmtree(scratch, ignore_errors=True)
        stage = record["stage"]
        settled.append(record["recipe"])
        noted += record["findings"]
    return stage, "\n".join(settled), noted


def _apply_step(state: _State, model: Model, step: Step, scratch: Path) -> Model:
    """One step, whose checkpoints stand in ``scratch`` until its stage is kept."""
    scratch.mkdir(parents=True, exist_ok=True)
    token = train.scratch.set(scratch)
    try:
        torch.manual_seed(state.seed)
        with started_from(state.original):
            return recipe.apply_step(model, step, state.task)
    finally:
        train.scratch.reset(token)


def _stored(ledger: Ledger, stage: str) -> Model:
    """The model of a stage."""
    path = ledger.get(stage, MODEL)
    if path is None:
        gone = FileNotFoundError(f"stage {stage}")
        raise UserError(f"{ledger.folder}: {gone} is gone; start the same run again.") from gone
    return decode(path.read_bytes(), str(path))


def _trial(attempt: Attempt, record: dict[str, Any]) -> Trial:
    measurement, comparison = record["measurement"], record["comparison"]
    return Trial(
        steps=[recipe.line(step) for step in recipe.from_toml(record["recipe"])],
        title=attempt.title,
        reason=attempt.reason,
        expected=attempt.expected,
        kept=record["kept"],
        decision=record["decision"],
        measurement=Measurement(**measurement) if measurement else None,
        comparison=Comparison(**comparison) if comparison else None,
        seconds=record["seconds"],
        stage=record["stage"],
        findings=record["findings"],
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


def _run(
    state: _State, steps: Sequence[Step] | None, identity: dict[str, Any], command: str
) -> Run:
    """All recipes, and then the claim: on the test split, which no decision has seen."""
    recipes = _recipes(state, steps)
    trials, best = _try_recipes(state, recipes)
    progress.say("Proof: the exported file beside the original, on the test split")
    files = {"original": state.original_file, "compressed": best.file}
    measured = measure(files, state.original, state.task, state.target, split="test")
    original, compressed = measured["original"], measured["compressed"]
    allowed = state.goals.allowed_drop(original.measurement)
    checks = state.goals.check(compressed.measurement, original.measurement)
    return Run(
        name=state.ledger.folder.absolute().name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        goals=identity["goals"],
        target=identity["target"],
        versions=identity["versions"],
        data=identity["data"],
        seed=state.seed,
        plan=[details.plan_row(item) for item in recipes],
        baseline=state.baseline,
        trials=trials,
        artifact=details.artifact("model", best.file, best.steps, state.target),
        original=details.artifact("original", state.original_file, [], state.target),
        on_device={name: each.measurement for name, each in measured.items()},
        comparison=compare(original, compressed, allowed),
        checks=checks,
        met=all(check.met for check in checks),
        verdict=details.verdict(checks, bool(best.steps), bool(trials)),
        details={
            "model_sha256": identity["model"],
            "batch_size": identity["batch_size"],
            "files": identity["files"],
            "stage_sha256": best.stage,
            "packed_bytes": _packed(state, best),
            **details.collect(
                state.original, best.model, state.task, measured, best.file, state.target
            ),
            "explanation": _explanation(state, best, sum(trial.seconds for trial in trials)),
        },
    )


def _packed(state: _State, best: _Best) -> dict[str, int] | None:
    """What both files take once they are packed, of a recipe that was asked for."""
    if not (state.asked and best.steps):
        return None
    files = {"original": state.original_file, "compressed": best.file}
    return {name: packed_bytes(file) for name, file in files.items()}


def _explanation(state: _State, best: _Best, took_s: float) -> dict[str, Any] | None:
    """Where the score went, in a tenth of the time that the trials took, or 20 s at most."""
    if not best.steps:
        return None
    seconds = min(LONGEST_EXPLANATION_S, took_s / 10)
    made = state.original, best.model, best.file, state.target.runtime
    return within_run(*made, state.task, best.steps, seconds)


def replay(
    folder: str | Path, model: nn.Module | Model | str | Path, task: Task
) -> tuple[Artifact, str]:
    """Make a run's artifact again from its recipe: the artifact as kept, and the new SHA-256.

    Raises:
        UserError: the folder holds no finished run, or model or data are not those of the run.
    """
    run = details.load_run(folder)
    assert run.artifact is not None
    captured = capture(model, task.example, task.dynamic)
    changed = next(_changed(run, captured, task), None)
    if changed:
        raise UserError(f"{folder}: {changed} is not the one of the run.")
    forked = torch.random.fork_rng(devices=[])
    with forked, tempfile.TemporaryDirectory() as made, started_from(captured):
        for step in recipe.from_toml(run.artifact.recipe, "the run's recipe"):
            torch.manual_seed(run.seed)
            progress.say(f"  {recipe.line(step)}")
            # through the stored form, as in the run
            captured = decode(encode(recipe.apply_step(captured, step, task)), "replay")
        chosen = runtime(run.artifact.runtime)
        path = chosen.lower(captured, Path(made) / f"replay{chosen.SUFFIX}")
        return run.artifact, digest(path)


def _changed(run: Run, model: Model, task: Task) -> Iterator[str]:
    """What is not as it was in the run."""
    if _digest(model) != run.details["model_sha256"]:
        yield "the model"
    for path, sha256 in run.details.get("files", {}).items():
        if not Path(path).is_file() or digest(Path(path)) != sha256:
            yield path
    yield from details.changed_task(run, task)
