"""From one stage of a run to the next: apply, export, measure, keep or undo."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import Goals
from paredown.core.measurement import Comparison, Measurement
from paredown.core.results import Trial
from paredown.core.task import Target, Task
from paredown.core.units import GOALS, human
from paredown.graph import machine
from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.graph.store import encode
from paredown.measure.inputs import real_inputs
from paredown.measure.measure import Measured, compare, measure
from paredown.run.ledger import MODEL, Ledger, stage_key
from paredown.search import decide
from paredown.search.decide import Standing
from paredown.search.proposal import Attempt
from paredown.ship.pack.container import packed_bytes
from paredown.steps import recipe
from paredown.steps.step import Setting, Step
from paredown.targets.artifact import parts
from paredown.targets.runtimes import runtime


@dataclass
class State:
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

    def done(self, standing: Standing) -> bool:
        """Whether there is nothing left to do: an amount was asked for, and every goal is met."""
        asked = any(getattr(self.goals, goal) is not None for goal in GOALS)
        return asked and not self.goals.missed(standing.measurement, standing.beside)

    @property
    def start(self) -> Standing:
        """Where the original stands."""
        return Standing(self.baseline, self.baseline)


@dataclass
class Best:
    """Where a recipe stands: the model kept so far, its stage, file, steps and how it measured."""

    model: Model
    stage: str
    file: Path
    steps: list[Step]
    standing: Standing


def begun(
    ledger: Ledger,
    model: Model,
    task: Task,
    goals: Goals,
    target: Target,
    seed: int,
    asked: bool,
) -> State:
    progress.say("Baseline: export the original and measure it")
    stage = ledger.put(encode(model), MODEL)
    _check_space(ledger, model)
    file = _lowered(ledger, model, stage, target, task)
    key = stage_key({"baseline": stage})
    record = ledger.done(key)
    if record is None:
        measured = measure({"original": file}, model, task, target)["original"].measurement
        record = {"stage": stage, "suffix": MODEL, "measurement": dataclasses.asdict(measured)}
        ledger.finish(key, record)
    measurement = Measurement(**record["measurement"])
    progress.say(f"  {_figures(measurement)}")
    for note in [*model.notes, *filter(None, [own_zeros.told(own_zeros.found(model))])]:
        progress.say(f"  note: {note}")
    return State(ledger, task, goals, target, model, file, measurement, seed, asked)


def _check_space(ledger: Ledger, model: Model) -> None:
    """Room for what the next step keeps: each of its models, a checkpoint, the exported file."""
    ledger.check_space(6 * sum(tensor.nbytes for tensor in model.state_dict().values()))


def _lowered(ledger: Ledger, model: Model, stage: str, target: Target, task: Task) -> Path:
    """The exported file of a stage, made once."""
    chosen = runtime(target.runtime)
    key = stage_key({"lower": stage, "runtime": target.runtime})
    record = ledger.done(key)
    if record is None:
        lowering = ledger.folder / f"lowering{chosen.SUFFIX}"
        path = chosen.lower(model, lowering, real_inputs(model, task))
        sha256 = ledger.keep(path)
        for part in parts(path):
            part.unlink()
        record = {"stage": sha256, "suffix": chosen.SUFFIX}
        ledger.finish(key, record)
    found = ledger.get(record["stage"], record["suffix"])
    assert found is not None
    return found


def tried(state: State, attempt: Attempt, best: Best) -> tuple[Trial, Best]:
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
    file = _lowered(state.ledger, model, record["stage"], state.target, state.task)
    steps = [*best.steps, *recipe.from_toml(record["recipe"])]
    standing = Standing(trial.measurement, Measurement(**record["original"]), trial.comparison)
    return trial, Best(model, record["stage"], file, steps, standing)


def _run_attempt(state: State, attempt: Attempt, best: Best, key: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        stage, settled, found = _apply(state, attempt.steps, best, key)
        made = _stored(state.ledger, stage)
        file = _lowered(state.ledger, made, stage, state.target, state.task)
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
    kept, decision = decide.decide(measured, allowed)
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
        "original": dataclasses.asdict(measured["original"].measurement),
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
    if after <= decide.PAYS["size"] * before:
        return True, f"packed for delivery {change}; {decision}"
    return False, f"{decision}; nor packed for delivery: {change}"


def _apply(
    state: State, steps: Sequence[Step], best: Best, key: str
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
            found: list[dict[str, Any]] = []
            setting = Setting(state.original, state.target, scratch, found.append)
            with machine.same_numbers(state.seed):
                step = step.settle(model, state.task, setting)
            made = _apply_step(state, model, step, setting)
            record = {"stage": state.ledger.put(encode(made), MODEL), "suffix": MODEL}
            record |= {"recipe": recipe.to_toml([step]), "findings": found}
            state.ledger.finish(partial, record)
        shutil.rmtree(scratch, ignore_errors=True)
        stage = record["stage"]
        settled.append(record["recipe"])
        noted += record["findings"]
    return stage, "\n".join(settled), noted


def _apply_step(state: State, model: Model, step: Step, setting: Setting) -> Model:
    """One step, whose checkpoints stand in its scratch folder until its stage is kept."""
    assert setting.scratch is not None
    setting.scratch.mkdir(parents=True, exist_ok=True)
    with machine.same_numbers(state.seed):
        return recipe.apply_step(model, step, state.task, setting)


def _stored(ledger: Ledger, stage: str) -> Model:
    """The model of a stage."""
    path = ledger.get(stage, MODEL)
    if path is None:
        gone = FileNotFoundError(f"stage {stage}")
        raise UserError(f"{ledger.folder}: {gone} is gone; start the same run again.") from gone
    return Model.decode(path.read_bytes(), str(path))


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
