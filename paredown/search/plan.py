"""Goals -> ranked recipes, each with its reason and what is expected; and what of them to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.task import Target, Task
from paredown.core.units import Limit
from paredown.graph.coupling.coupling import analyze
from paredown.graph.model import Model
from paredown.search import offers
from paredown.search.offers import MARGIN, Attempt, Recipe
from paredown.steps import recipe
from paredown.steps.step import Step
from paredown.targets.runtimes import runtime

RECOVERING = ("fine_tune", "distill")  # steps that win back accuracy for the one before them
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
