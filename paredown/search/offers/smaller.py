"""Less to compute: weights in factors, and fewer channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paredown.graph.coupling.coupling import analyze
from paredown.search.pieces import MARGIN, asked, make, recovery, then_int8
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Share, Situation
from paredown.steps.low_rank.factor_layers import factor_layers
from paredown.steps.low_rank.factor_options import least

NARROW = 0.5  # share to leave where no amount is asked for
NARROWEST = 0.02  # a smaller share is no model any more
ROUND = 0.6  # the least share that one round of pruning leaves; smaller cuts are easier to mend
FACTORED = 0.6  # of the share that would do: factors are two ops for one, whose own bytes count


def factored(situation: Situation) -> Sequence[Proposal]:
    """Where integers should not do for the goals, and factors could; it needs no training."""
    needed = situation.share
    if needed.left >= 1 or not situation.calibrates or not situation.factorable:
        return []
    share = max(NARROWEST, needed.left * FACTORED)
    if 1 - share > _removable(situation, needed.amount):
        return []
    attempt = Attempt(
        (make("low_rank", ratio=round(1 - share, 3), amount=needed.amount),),
        "Factor weights",
        "weights become products of smaller ones, by what layers see of the calibration data",
        f"{share:.2f}x of the {needed.named}, in about twice as many layers",
    )
    reason = (
        f"{asked(situation.goals)}: leave {share:.0%} of the {needed.named} in factors, "
        "train nothing"
    )
    return [then_int8(situation, f"Factor to {share:.0%}", reason, (attempt,))]


def _removable(situation: Situation, amount: str) -> float:
    """The share that factors of the least ranks in all layers that may be factored would remove."""
    layers, _ = factor_layers(situation.model, (), ())
    counted = int(amount == "macs")  # of a layer's costs
    saved = 0.0
    for layer in layers:
        whole = (layer.weight.numel(), layer.macs)[counted]
        found = [layer.cost(method, ranks)[counted] for method, ranks in least(layer).items()]
        saved += max(0.0, whole - min(found, default=whole))
    costs = analyze(situation.model).costs()
    return saved / max(1, costs.macs if counted else costs.parameters)


def narrow(situation: Situation) -> Sequence[Proposal]:
    """Where channels can be cut: to the share that should do, and to half of that."""
    if not situation.calibrates or not analyze(situation.model).groups:
        return []
    needed = situation.share
    first = NARROW if needed.left >= 1 else needed.left * MARGIN
    shares = dict.fromkeys(max(NARROWEST, share) for share in (first, first / 2))
    return [_narrowed(situation, Share(share, needed.amount)) for share in shares]


def _narrowed(situation: Situation, share: Share) -> Proposal:
    attempts = _cuts(situation, share)
    if not situation.trains:
        how = "fitting what reads them by least squares, since there is nothing to train with"
    else:
        counted = "one round" if len(attempts) == 1 else f"{len(attempts)} rounds"
        trained = "fine-tuning" if situation.task.loss else "distillation, which needs no labels"
        how = f"in {counted}, each with a least-squares fit and {trained}"
    left = f"{share.left:.0%}"
    reason = f"{asked(situation.goals)}: leave {left} of the {share.named}, {how}"
    return then_int8(situation, f"Cut channels to {left}", reason, attempts)


def _cuts(situation: Situation, share: Share) -> tuple[Attempt, ...]:
    """Small cuts with training between where there is something to train with, else one."""
    trains = situation.trains
    rounds = max(1, math.ceil(math.log(share.left) / math.log(ROUND))) if trains else 1
    ratio = round(1 - share.left ** (1 / rounds), 3)
    steps = [make("prune_channels", ratio=ratio, amount=share.amount, reconstruct=True)]
    if trains:
        steps.append(recovery(situation, 1e-3))
    return tuple(
        Attempt(
            tuple(steps),
            f"Cut channels, round {number} of {rounds}" if rounds > 1 else "Cut channels",
            "the whole channels, neurons and heads that matter least go; what is left is a "
            "smaller dense model, smaller and faster on every runtime",
            f"{(1 - ratio) ** number:.2f}x of the {share.named}",
        )
        for number in range(1, rounds + 1)
    )
