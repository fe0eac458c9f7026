"""Goals -> ranked recipes, each with its reason and what is expected; and what of them to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paredown import offers, recipe
from paredown.graph.coupling import analyze
from paredown.graph.model import Model
from paredown.measure import Measured, compare
from paredown.offers import MARGIN, Attempt, Recipe
from paredown.runtimes import runtime
from paredown.types import Comparison, Goals, Limit, Measurement, Step, Target, Task, human

RECOVERING = ("fine_tune", "distill")  # steps that win back accuracy for the one before them
PAYS = {"size": 0.99, "memory": 0.97}  # an attempt pays below this share of the best so far
FASTER = 1.02  # and above this speed-up, if its interval excludes 1
INT8_TIME = 0.5  # of float, as found on convolutional nets: more often less than more
NARROW = 0.5  # share to leave where no amount is asked for
NARROWEST = 0.02  # a smaller share is no model any more
FACTORED = 0.6  # of the share that would do: factors are two ops for one, whose own bytes count


def plan(
    model: Model,
    task: Task,
    goals: Goals,
    baseline: Measurement,
    seed: int = 0,
    target: Target | None = None,
) -> list[Recipe]:
    """Recipes for these goals, the most promising first, of what the target's runtime can write.

    Where 8-bit integers alone should do, they come first. Where more is asked for, weights are
    factored before it, which needs no training; then channels are cut instead, in rounds with
    training between where the task can train, else once with a least-squares fit; a deeper cut
    follows, for where the first one misses. Training is fine-tuning where there are labels and a
    loss, else distillation from the original. Later recipes are tried only where the earlier ones
    miss a goal. ``seed`` is that of the training.
    """
    chosen = runtime((target or Target()).runtime)
    recipes = []
    if not task.missing({"calibration"}):
        layers = offers.quantizable(model)
        integers = chosen.INT8_BYTES if layers else None
        int8 = offers.int8(model, baseline, integers) if integers else None
        share, amount = needed_share(model, goals, baseline, integers)
        recipes = [offers.int8_alone(int8, goals)] if int8 and share >= 1 else []
        if share < 1 and layers:
            recipes.append(offers.factored(goals, max(NARROWEST, share * FACTORED), amount, int8))
        if analyze(model).groups:
            first = NARROW if share >= 1 else share * MARGIN
            for kept in (first, first / 2):
                cuts = offers.prune(task, max(NARROWEST, kept), amount, seed)
                recipes.append(offers.narrow(task, goals, cuts, int8))
        if int8 and task.train is not None:
            recipes.append(offers.int8_trained(task, int8, seed))
        elif int8 and share < 1:
            recipes.append(offers.int8_alone(int8, goals))
        if int8 and goals.max_drop is not None and not task.missing({"validation", "score"}):
            recipes.append(offers.int8_mixed(int8, float(goals.max_drop)))
        if integers and share < 1 and amount == "parameters":
            recipes = offers.with_fewer_bits(recipes, model, task, goals, baseline, chosen, seed)
    if chosen.INT8_BYTES is None and goals.size is not None and task.train is not None:
        recipes += offers.few_values(task, goals, seed)
    if "int4-weights" in chosen.FORMS and offers.tables_weigh_most(model, baseline):
        recipes.append(offers.four_bit_weights(task))
    return [*recipes, *([offers.sixteen_bit(baseline)] if "fp16" in chosen.FORMS else [])]


def needed_share(
    model: Model, goals: Goals, baseline: Measurement, integers: tuple[int, int] | None
) -> tuple[float, str]:
    """The share that may stay for the goals, and of what: "parameters" where the size asks for the
    most, else "macs".

    8-bit integers are counted in where ``integers``, their bytes for a channel and for a layer, are
    known; the share is 1 and more where they should do by themselves.
    """
    size = time = math.inf
    if isinstance(goals.size, Limit):
        bytes_ = baseline.size_bytes
        expected = offers.expected_integer_bytes(model, bytes_, integers) if integers else bytes_
        size = goals.size.absolute(bytes_) / expected
    for goal in ("latency", "energy", "throughput"):
        limit, value = getattr(goals, goal), baseline.quantity(goal)
        if limit is not None and value:
            asked = limit.absolute(value) / value
            left = 1 / asked if goal == "throughput" else asked
            time = min(time, left / INT8_TIME if integers else left)
    return (size, "parameters") if size <= time else (time, "macs")


def attempts(steps: Sequence[Step]) -> tuple[Attempt, ...]:
    """A user's own recipe cut into attempts: each step with the recovering ones behind it."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and recipe.name(step) in RECOVERING:
            groups[-1].append(step)
        else:
            groups.append([step])
    return tuple(Attempt(tuple(group), recipe.line(group[0]), "asked for", "") for group in groups)


def rank(goals: Goals, measurement: Measurement, baseline: Measurement) -> tuple[float, ...]:
    """Fewest goals missed, then the least excess over the bounds, then the smallest file."""
    missed = [check for check in goals.check(measurement, baseline) if not check.met]
    excess = sum(_excess(check.goal, check.value, check.bound) for check in missed)
    return (-len(missed), -excess, -measurement.size_bytes)


def _excess(goal: str, value: float | None, bound: float) -> float:
    if value is None:
        return 1.0
    ratio = value / max(bound, 1e-12)
    return 1 / ratio - 1 if goal == "throughput" else ratio - 1


def decide(measured: dict[str, Measured], allowed: float | None) -> tuple[bool, str]:
    """Keep what pays on the exported file and stays within the allowed drop of the score.

    ``measured`` holds the original, the candidate and the best so far, where that is not the
    original, measured together.
    """
    standing = measured.get("best", measured["original"])
    best, candidate = standing.measurement, measured["candidate"].measurement
    drop = (measured["original"].measurement.score or 0.0) - (candidate.score or 0.0)
    if allowed is not None and drop > allowed + 1e-12:
        scale, unit = (100, " points") if candidate.score_in_points else (1, "")
        return False, (
            f"the score fell by {drop * scale:.3g}{unit}; the goal allows {allowed * scale:.3g}"
        )
    against_best = compare(standing, measured["candidate"], None)
    size = candidate.size_bytes / best.size_bytes
    found = f"size {_change('size', best, candidate)} ({size:.2f}x), {against_best.speed}"
    if size <= PAYS["size"] or _faster(against_best):
        return True, found
    if _lighter(best, candidate):
        return True, f"peak memory {_change('memory', best, candidate)}; {found}"
    return False, f"it does not pay in the exported file: {found}"


def _faster(against_best: Comparison) -> bool:
    return (against_best.speedup or 1) >= FASTER and (against_best.speedup_low or 0) > 1


def _lighter(best: Measurement, candidate: Measurement) -> bool:
    if best.memory_bytes is None or candidate.memory_bytes is None:
        return False
    return candidate.memory_bytes / best.memory_bytes <= PAYS["memory"]


def _change(goal: str, before: Measurement, after: Measurement) -> str:
    return " to ".join(human(goal, m.quantity(goal) or 0.0) for m in (before, after))
