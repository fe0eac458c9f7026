"""A small model of the user's own in the original's place."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.core.units import human
from paredown.data import splits
from paredown.search.pieces import make, then_int8
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation
from paredown.train.distill.student import found

EPOCHS = (12, 60)  # at least and at most, in between as many as
STEPS = 600  # updates take, for a model that knows nothing yet
LR = 3e-3


def student(situation: Situation) -> Sequence[Proposal]:
    """Where the task names one, and has something to teach it with: before all else, since a user
    who names one means it."""
    task = situation.task
    if task.student is None or not situation.trains:
        return []
    sizes = [
        sum(p.numel() for p in model.parameters())
        for model in (situation.model, found(task.student, task))
    ]
    share = sizes[1] / sizes[0]
    per_epoch = -(-splits.size(splits.split(task, "train")) // task.batch_size)
    how = {
        "student": task.student,
        "epochs": max(EPOCHS[0], min(EPOCHS[1], -(-STEPS // per_epoch))),
        "lr": LR,
        "seed": situation.seed,
    } | ({} if task.loss else {"alpha": 0.0})
    attempt = Attempt(
        (make("distill", **how),),
        "The student, taught by the original",
        "a small architecture learns what the original says of the training data",
        f"about {human('size', share * situation.baseline.size_bytes)} ({share:.2f}x)",
    )
    reason = f"the task names a student of {share:.2f}x the parameters"
    return [then_int8(situation, "The student", reason, (attempt,))]
