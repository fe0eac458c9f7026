"""From one stage of a run to the next: apply, export, measure, keep or undo."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.goals import GoalCheck, Goals
from paredown.core.measurement import Measurement
from paredown.core.memory import release
from paredown.core.results import Trial
from paredown.core.task import Target, Task
from paredown.core.units import human
from paredown.graph import machine
from paredown.graph.holds import own_zeros
from paredown.graph.model import Model
from paredown.graph.store import encoded
from paredown.measure import looks
from paredown.measure.inputs import real_inputs
from paredown.measure.looks import Question
from paredown.measure.measure import Measured, compare, measure
from paredown.run.baseline import of_original
from paredown.run.kept import MEASURED, keep, kept
from paredown.run.ledger import MODEL, Ledger, stage_key
from paredown.run.reach import steering, students, unreachable
from paredown.search import decide
from paredown.search.decide import Decision, Standing
from paredown.search.proposal import Attempt, Proposal
from paredown.search.questions import questions
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
    beyond: frozenset[str] = frozenset()  # goals that nothing can meet here

    @property
    def steering(self) -> Goals:
        """The goals by which is decided what is tried and kept."""
        return steering(self.goals, self.beyond)

    def done(self, standing: Standing) -> bool:
        """Whether there is nothing left to do: an amount was asked for, and every goal is met."""
        return decide.asks(self.steering) and all(each.met for each in self._checks(standing))

    def unproven(self, standing: Standing) -> str:
        """That every goal is met as measured, and which lack the proof that was asked for; "" where
        that is not so."""
        checks = self._checks(standing)
        lacking = [check.title for check in checks if not check.met]
        if not lacking or not all(check.within for check in checks):
            return ""
        return (
            f"Every goal is met as measured, but it is not proven for {' and '.join(lacking)}, as "
            "--proof asks, so what else there is gets tried."
        )

    def _checks(self, standing: Standing) -> list[GoalCheck]:
        measured = standing.measurement, standing.beside
        return self.steering.check(*measured, compared=standing.compared)

    @property
    def start(self) -> Standing:
        """Where the original stands."""
        return Standing(self.baseline, self.baseline)


@dataclass(frozen=True)
class Point:
    """A measured file that may be the artifact: its stage, "" of the original, the file, the steps
    that made it and how it measured; and the numbers of the trials that these came from."""

    stage: str
    file: Path
    steps: tuple[Step, ...]
    standing: Standing
    trials: tuple[int, ...] = ()

    def model(self, state: State) -> Model:
        return _stored(state.ledger, self.stage) if self.stage else state.original


def begun(
    ledger: Ledger,
    model: Model,
    task: Task,
    goals: Goals,
    target: Target,
    seed: int,
    steps: Sequence[Step] | None,
) -> State:
    progress.say("Baseline: export the original and measure it")
    stage = ledger.put(encoded(model), MODEL)
    _check_space(ledger, model)
    file = _lowered(ledger, stage, target, task)
    key = stage_key({"baseline": stage})
    record = ledger.done(key)
    if record is None:
        found = of_original(model, task, target, lambda: file)
        record = {"stage": stage, "suffix": MODEL, **dataclasses.asdict(found)}
        ledger.finish(key, record)
    measurement = Measurement(**record["measurement"])
    progress.say(f"  {_figures(measurement)}")
    progress.say(f"  {_takes(record['seconds'], target.rounds)}")
    for note in [*model.notes, *filter(None, [own_zeros.told(own_zeros.found(model))])]:
        progress.say(f"  note: {note}")
    named = partial(students, model, task, steps or ())
    beyond = unreachable(goals, target, measurement, record["graph_bytes"], named)
    for sentence in beyond.values():
        progress.say(f"  out of reach: {sentence}")
    given = ledger, task, goals, target, model, file, measurement, seed, steps is not None
    return State(*given, frozenset(beyond))


def _takes(baseline_s: float, rounds: int) -> str:
    """What a step's measurement will take, by that of one file in the fewest rounds."""
    least, most = 2 * baseline_s, 3 * baseline_s * max(1.0, rounds / looks.FIRST)
    return (
        f"To measure a step takes about {least:.0f} s where its speed is clear, up to {most:.0f} s "
        f"where it is not; fewer rounds than {rounds} (--rounds) take less."
    )


def _check_space(ledger: Ledger, model: Model) -> None:
    """Room for what the next step keeps: each of its models, a checkpoint, the exported file."""
    ledger.check_space(6 * model.size_bytes)


def _lowered(ledger: Ledger, stage: str, target: Target, task: Task) -> Path:
    """The exported file of a stage, made once."""
    chosen = runtime(target.runtime)
    key = stage_key({"lower": stage, "runtime": target.runtime})
    record = ledger.done(key)
    if record is None:
        lowering = ledger.folder / f"lowering{chosen.SUFFIX}"
        model = _stored(ledger, stage)
        path = chosen.lower(model, lowering, real_inputs(model, task))
        size_bytes = model.size_bytes
        del model
        release(size_bytes)
        sha256 = ledger.keep(path)
        for part in parts(path):
            part.unlink()
        record = {"stage": sha256, "suffix": chosen.SUFFIX}
        ledger.finish(key, record)
    found = ledger.get(record["stage"], record["suffix"])
    assert found is not None
    return found


def tried(
    state: State, item: Proposal, attempt: Attempt, best: Point, number: int
) -> tuple[Trial, Point | None]:
    """One attempt on top of the best so far, and its point where it may be the artifact; what was
    finished is taken from the ledger, under whichever goals.

    Args:
        item: the recipe that the attempt is part of.
        number: of the trial, from 1 up.
    """
    key = stage_key({"attempt": _key(state, best.stage, attempt.steps)})
    record = state.ledger.done(key)
    measured = kept(state.ledger, record["measured"]) if record and record["measured"] else None
    if measured is not None and not _enough(state, best, measured):
        measured = None
    if record is None or (record["measured"] and measured is None):
        steps = ", ".join(recipe.line(step) for step in attempt.steps)
        progress.say(f"  {attempt.title}" + (f" ({steps})" if steps != attempt.title else ""))
        record, measured = _made(state, attempt, best)
        state.ledger.finish(key, record)
    trial = Trial(
        steps=[recipe.line(step) for step in recipe.from_toml(record["recipe"])],
        title=attempt.title,
        reason=attempt.reason,
        expected=attempt.expected,
        kept=False,
        decision=record["problem"],
        measurement=None,
        comparison=None,
        seconds=record["seconds"],
        stage=record["stage"],
        findings=record["findings"],
        recipe=item.title,
        after=best.trials[-1] if best.trials else 0,
    )
    if measured is None:
        return trial, None
    return _judged(state, trial, best, number, record, measured)


def _key(state: State, after: str, steps: Sequence[Step]) -> str:
    """What comes of these steps after a stage, "" of the original."""
    return stage_key(
        {
            "after": after,
            "steps": recipe.to_toml(steps),
            "files": recipe.contents(steps, state.task),
            "seed": state.seed,
        }
    )


def _judged(
    state: State,
    trial: Trial,
    best: Point,
    number: int,
    record: dict[str, Any],
    measured: dict[str, Measured],
) -> tuple[Trial, Point | None]:
    """What the goals say of what was measured."""
    original, candidate = measured["original"], measured["candidate"]
    compared = compare(original, candidate, state.goals.allowed_drop(original.measurement))
    found = decide.decide(state.steering, measured)
    file = _lowered(state.ledger, record["stage"], state.target, state.task)
    fell = decide.too_far(state.goals, original.measurement, candidate.measurement)
    if state.asked and not (found.stands or fell):
        found = _pays_packed(best.file, file, found)
    trial = dataclasses.replace(
        trial,
        kept=found.kept,
        decision=found.words,
        measurement=candidate.measurement,
        comparison=compared,
    )
    standing = Standing(candidate.measurement, original.measurement, compared)
    steps = (*best.steps, *recipe.from_toml(record["recipe"]))
    point = Point(record["stage"], file, steps, standing, (*best.trials, number))
    return trial, point if found.kept or found.stands else None


def _made(
    state: State, attempt: Attempt, best: Point
) -> tuple[dict[str, Any], dict[str, Measured] | None]:
    """The attempt's stage and record, and its file measured beside those it is compared with."""
    began = time.monotonic()
    try:
        model = best.model(state)
        _check_space(state.ledger, model)
        stage, settled, found = _apply(state, attempt.steps, best.stage, model)
        file = _lowered(state.ledger, stage, state.target, state.task)
        measured, sha256 = _measured(state, best, file)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # the disk's fault, not the step's
            raise
        failed: dict[str, Any] = {"stage": "", "suffix": "", "measured": "", "findings": []}
        failed |= {"recipe": recipe.to_toml(attempt.steps), "problem": str(error)}
        return failed | {"seconds": time.monotonic() - began}, None
    record: dict[str, Any] = {"stage": stage, "suffix": MODEL, "problem": "", "findings": found}
    record |= {"recipe": settled, "measured": sha256}
    return record | {"seconds": time.monotonic() - began}, measured


def _measured(state: State, best: Point, file: Path) -> tuple[dict[str, Measured], str]:
    """A file measured beside the original and the best so far, and the stage of what was measured;
    once, by whichever steps it came."""
    files = {"original": state.original_file, "candidate": file}
    if best.stage:  # else the best so far is the original
        files["best"] = best.file
    key = stage_key({"measured": {name: each.name for name, each in files.items()}})
    record = state.ledger.done(key)
    measured = kept(state.ledger, record["stage"]) if record else None
    if record is not None and measured is not None and _enough(state, best, measured):
        return measured, str(record["stage"])
    timely = _questions(state, best)
    measured = measure(files, state.original, state.task, state.target, questions=timely)
    sha256 = keep(state.ledger, measured)
    state.ledger.finish(key, {"stage": sha256, "suffix": MEASURED})
    return measured, sha256


def _questions(state: State, best: Point) -> list[Question]:
    return questions(state.steering, state.baseline, "best" if best.stage else "original")


def _enough(state: State, best: Point, measured: dict[str, Measured]) -> bool:
    """Whether what was measured for other goals, or in fewer rounds, answers these too."""
    rounds = {name: each.rounds for name, each in measured.items()}
    full = len(rounds["original"]) >= state.target.rounds
    return full or looks.answered(_questions(state, best), rounds)


def proof(state: State, point: Point) -> dict[str, Measured]:
    """The point's file and the original, measured on the test split, once."""
    key = stage_key({"proof": point.stage})
    record = state.ledger.done(key)
    measured = kept(state.ledger, record["stage"]) if record else None
    if measured is None:
        files = {"original": state.original_file, "compressed": point.file}
        measured = measure(files, state.original, state.task, state.target, split="test")
        state.ledger.finish(key, {"stage": keep(state.ledger, measured), "suffix": MEASURED})
    return measured


def _pays_packed(best: Path, candidate: Path, decision: Decision) -> Decision:
    """Zeros and shared values make an exported file smaller only once it is packed: of a recipe
    that was asked for they are kept for that, by the same bound."""
    before, after = packed_bytes(best), packed_bytes(candidate)
    change = f"{human('size', before)} to {human('size', after)} ({after / before:.2f}x)"
    if after <= decide.PAYS["size"] * before:
        return Decision(True, f"packed for delivery {change}; {decision.words}", True)
    words = f"{decision.words}; nor packed for delivery: {change}"
    return dataclasses.replace(decision, words=words)


def _apply(
    state: State, steps: Sequence[Step], stage: str, start: Model
) -> tuple[str, str, list[dict[str, Any]]]:
    """The stage after the attempt's steps, each finished one being a stage of its own that other
    attempts which begin alike take too; the steps as settled, in TOML; and what they found out.

    Every step begins from the stored form, so that an interrupted run takes the same way.

    Args:
        stage: of ``start``, from which the first step begins.
    """
    settled: list[str] = []
    noted: list[dict[str, Any]] = []
    for step in steps:
        key = _key(state, stage, [step])
        record = state.ledger.done(key)
        scratch = state.ledger.folder / "scratch" / key
        if record is None:
            model = _stored(state.ledger, stage) if stage else start
            found: list[dict[str, Any]] = []
            setting = Setting(state.original, state.target, scratch, found.append)
            with machine.same_numbers(state.seed):
                step = step.settle(model, state.task, setting)
            made = _apply_step(state, model, step, setting)
            record = {"stage": state.ledger.put(encoded(made), MODEL), "suffix": MODEL}
            record |= {"recipe": recipe.to_toml([step]), "findings": found}
            state.ledger.finish(key, record)
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
    return Model.load(path)


def _figures(m: Measurement) -> str:
    parts = [human("size", m.size_bytes)]
    if m.score is not None:
        parts.append(f"score {m.score:.2%}" if m.score_in_points else f"score {m.score:.4g}")
    if m.latency_ms_p50 is not None:
        parts.append(f"{human('latency', m.latency_ms_p50)} median")
    if m.memory_bytes is not None:
        own = m.memory_model_bytes
        share = "" if own is None else f", {human('memory', own)} of it the model's"
        parts.append(f"{human('memory', m.memory_bytes)} peak memory{share}")
    return ", ".join(parts)
