"""How to train: settings, and the rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paredown.core.settings import check_fields, check_seed, require
from paredown.graph.holds import own_zeros
from paredown.train import qat


@dataclass(frozen=True)
class Training:
    """How to train.

    ``lr`` rises linearly over the ``warmup`` share of all steps, then falls as a half cosine
    (SGDR, arXiv 1608.03983). Weight decay spares tensors of one dimension (biases, norms). Where
    memory runs out, a batch is run in parts, twice, for the gradients of the whole batch's loss;
    what that leaves different, such as the statistics of batch norm, is said.

    Args:
        epochs: passes over the training data; 0.25 is a quarter of one pass.
        optimizer: "adamw" (decoupled decay, arXiv 1711.05101) or "sgd" with ``momentum``.
        clip_norm: upper bound of the gradient's norm, or None.
        batch_size: examples per optimiser step; None takes the task's.
        group_lasso: strength of a group lasso over the units that `PruneChannels` can cut, so that
            it later finds units at nothing (`paredown.train.lasso`); 0 is off. Each step takes
            ``lr * group_lasso`` of its group's mean norm from the strongest unit, 16 times that
            from the weakest, for each group that a weight belongs to.
        quantizers: what the scales of a quantized model do: "learned" trains them with the weights
            (LSQ, arXiv 1902.08153), "average" lets them follow the moving average of the ranges
            (arXiv 1712.05877), "frozen" leaves them. No effect on a model in float.
        patience: stop after so many epochs without a better validation score and restore the
            best weights, if need be those it came with; None trains to the end and keeps the last.
        zeros: "keep" holds at zero what is pruned and the zeros that the model came with, where a
            hundredth of a weight or more is zero; "free" lets all of them train, from then on.
        seed: decides shuffling, dropout and augmentation; same seed and machine, same weights.
        device: "cpu", "cuda", or "auto" for the GPU where there is one.

    Raises:
        UserError: a setting is out of its range.
    """

    epochs: float = 1
    optimizer: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float | None = 1.0
    batch_size: int | None = None
    group_lasso: float = 0.0
    quantizers: str = "learned"
    patience: int | None = None
    zeros: str = own_zeros.KEEP
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        require("epochs", self.epochs, 0 < self.epochs < math.inf, "a number above 0")
        require("optimizer", self.optimizer, self.optimizer in _OPTIMIZERS, '"adamw" or "sgd"')
        require("lr", self.lr, 0 < self.lr < math.inf, "a number above 0, such as 5e-4")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 up, below 1")
        decay = self.weight_decay
        require("weight_decay", decay, 0 <= decay < math.inf, "a number from 0 up")
        require("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps, below 1")
        norm, size = self.clip_norm, self.batch_size
        require("clip_norm", norm, norm is None or norm > 0, "a number above 0, or None")
        require("batch_size", size, size is None or size >= 1, "a whole number from 1 up")
        lasso = self.group_lasso
        require("group_lasso", lasso, 0 <= lasso < math.inf, "a strength from 0 up; 0 is off")
        kinds = ", ".join(f'"{kind}"' for kind in qat.KINDS)
        require("quantizers", self.quantizers, self.quantizers in qat.KINDS, f"one of {kinds}")
        stop = self.patience
        require("patience", stop, stop is None or stop >= 1, "a whole number of epochs from 1 up")
        zeros = (own_zeros.KEEP, own_zeros.FREE)
        require("zeros", self.zeros, self.zeros in zeros, '"keep" or "free"')
        check_seed("seed", self.seed)
        devices = ("cpu", "cuda", "auto")
        require("device", self.device, self.device in devices, '"cpu", "cuda" or "auto"')


_OPTIMIZERS = ("adamw", "sgd")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of step 0 ... steps - 1: a linear rise, then a half cosine (arXiv 1608.03983).

    Example:
        >>> [round(learning_rate(step, 6, 1.0, 0.3), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
