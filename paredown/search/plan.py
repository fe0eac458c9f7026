"""Goals -> ranked proposals, each with its reason and what is expected of it."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.core.goals import Goals
from paredown.core.measurement import Measurement
from paredown.core.settings import check_arguments, check_seed
from paredown.core.task import Target, Task
from paredown.data import splits
from paredown.graph.model import Model
from paredown.search.offers import offers
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation
from paredown.steps import recipe
from paredown.steps.step import Step


def plan(
    model: Model,
    task: Task,
    goals: Goals,
    baseline: Measurement,
    seed: int = 0,
    target: Target | None = None,
) -> list[Proposal]:
    """Proposals for these goals, the most promising first, of what the target's runtime can write.

    Where 8-bit integers alone should do, they come first. Where more is asked for, weights are
    factored before it, which needs no training; then channels are cut instead, in rounds with
    training between where the task can train, else once with a least-squares fit; a deeper cut
    follows, for where the first one misses. Training is fine-tuning where there are labels and a
    loss, else distillation from the original. Later proposals are tried only where the earlier ones
    miss a goal. ``seed`` is that of the training.

    Raises:
        UserError: an argument of a wrong type.
    """
    check_arguments(
        model=(model, Model),
        task=(task, Task),
        goals=(goals, Goals),
        baseline=(baseline, Measurement),
        target=(target, Target | None),
    )
    check_seed("seed", seed)
    task = splits.prepared(task)
    situation = Situation(model, task, goals, baseline, target or Target(), seed)
    return [proposal for offer in offers() for proposal in offer(situation)]


def as_asked(steps: Sequence[Step]) -> Proposal:
    """The only proposal where a user gives a recipe."""
    return Proposal("as asked", "the recipe that was given", attempts(steps))


def attempts(steps: Sequence[Step]) -> tuple[Attempt, ...]:
    """A user's own recipe cut into attempts: each step with the recovering ones behind it."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.role == "recovers":
            groups[-1].append(step)
        else:
            groups.append([step])
    return tuple(Attempt(tuple(group), recipe.line(group[0]), "asked for", "") for group in groups)
