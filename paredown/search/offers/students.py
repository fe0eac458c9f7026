"""A small model in the original's place: the user's own, or one of the zoo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from paredown.core.units import human
from paredown.data import splits
from paredown.graph.coupling.coupling import analyze
from paredown.search.pieces import MARGIN, asked, make, then_int8
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation
from paredown.train.distill.student import captured
from paredown.train.distill.zoo_students import PREFIX, is_name, shape_of
from paredown.zoo.like import Shape, fitting, like

EPOCHS = (12, 60)  # at least and at most, in between as many as
STEPS = 600  # updates take, for a model that knows nothing yet
LR = 3e-3
FAR = 0.15  # the share from which on less is a matter for another architecture
USUAL = (
    "mobilenet_v2",
    "unet",
    "mlp",
    "encoder_tiny",
    "decoder_tiny",
)  # one for each kind of model
SMALL_IMAGES, SMALL = 64, "resnet_8"  # pixels of a side, up to which it is another for images
WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)


def student(situation: Situation) -> Sequence[Proposal]:
    """Where the task names one, and has something to teach it with: before all else, since a user
    who names one means it."""
    task = situation.task
    if task.student is None or not situation.trains:
        return []
    if is_name(task.student):
        return _of_zoo(situation, str(task.student), always=True)
    own = sum(p.numel() for p in captured(task.student, task).parameters())
    share = own / _parameters(situation)
    reason = f"the task names a student of {share:.2f}x the parameters"
    return [_taught(situation, {"student": task.student}, share, "The student", reason)]


def of_zoo(situation: Situation) -> Sequence[Proposal]:
    """Where the goals are far below what the original is likely to be pared down to."""
    named = situation.task.student is not None
    if named or not situation.trains or situation.share.left > FAR:
        return []
    shape = shape_of(situation.model)
    name = next((each for each in USUAL if each in fitting(shape)), None)
    if name == USUAL[0] and max(shape.inputs[0].shape[2:]) <= SMALL_IMAGES:
        name = SMALL
    return _of_zoo(situation, PREFIX + name) if name else []


def _of_zoo(situation: Situation, student: str, always: bool = False) -> Sequence[Proposal]:
    """The widest that should do for the goals; ``always``: the narrowest where none should."""
    shape, needed = shape_of(situation.model), situation.share
    whole = _parameters(situation)
    if needed.amount == "macs":
        whole = analyze(situation.model).costs().macs
    shares = {w: _amount(student, shape, w, needed.amount) / whole for w in WIDTHS}
    fit = [w for w, share in shares.items() if share <= min(1.0, needed.left * MARGIN)]
    if not fit and not always:
        return []
    width = max(fit) if fit else min(WIDTHS)
    share = _amount(student, shape, width, "parameters") / _parameters(situation)
    reason = (
        f"{asked(situation.goals)}: {shares[width]:.2f}x of the {needed.named}, in another "
        "architecture that learns from the original"
    )
    how = {"student": student, "width": width}
    return [_taught(situation, how, share, f"{student} at width {width:g}", reason)]


def _parameters(situation: Situation) -> int:
    return sum(p.numel() for p in situation.model.parameters())


def _amount(student: str, shape: Shape, width: float, amount: str) -> float:
    """How many parameters a net of the zoo has, or how many multiply-adds it takes."""
    with torch.device("meta"):
        net = like(student.removeprefix(PREFIX), shape, width).eval()
        if amount == "parameters":
            return sum(p.numel() for p in net.parameters())
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*[torch.empty_like(leaf, device="meta") for leaf in shape.inputs])
        return counter.get_total_flops() / 2


def _taught(
    situation: Situation, which: dict[str, object], share: float, title: str, reason: str
) -> Proposal:
    """A student that learns from the original, for as long as one that knows nothing takes."""
    task = situation.task
    per_epoch = -(-splits.size(splits.split(task, "train")) // task.batch_size)
    how = which | {
        "epochs": max(EPOCHS[0], min(EPOCHS[1], -(-STEPS // per_epoch))),
        "lr": LR,
        "seed": situation.seed,
    }
    attempt = Attempt(
        (make("distill", **how | ({} if task.loss else {"alpha": 0.0})),),
        f"{title}, taught by the original",
        "a small architecture learns what the original says of the training data",
        f"about {human('size', share * situation.baseline.size_bytes)} ({share:.2f}x)",
    )
    return then_int8(situation, title, reason, (attempt,))
