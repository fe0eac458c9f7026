"""Weight hashing: each weight is one of a few trained buckets, which a hash of its place picks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.settings import check_fields, check_seed, names_of
from paredown.core.task import Task
from paredown.graph.computed import fold_computed_weights
from paredown.graph.holds.shared import hold
from paredown.graph.holds.sharing import MASK, Sharing
from paredown.graph.model import Model
from paredown.steps.sharing.shareable import keep_zeros, shareable
from paredown.steps.step import ALONE, Entry, Setting, Step

NOTE_BYTES = 200  # that a file takes to say that a weight is hashed, and how


@dataclass(frozen=True)
class HashWeights(Step):
    """Give each weight the value of the bucket that a hash of its place picks, times a hashed sign
    (HashedNets, arXiv 1504.04788). Only the buckets and a seed need to be kept: ``model.save``, and
    the PyTorch runtime's file, hold nothing else of these weights.

    A bucket starts as the mean of the weights that it stands for, which is the nearest that buckets
    come to them, and trains with `FineTune` along the sum of their gradients; such a training
    belongs behind this step. Pruned weights stay zero.

    It pays in the PyTorch runtime's file: with a bucket for 64 weights the LeNet examples are 40
    and 44 times smaller, one at a loss of 1.5 points, one at none. It does not pay untrained, nor
    in an ONNX file, which has every weight written out, packed or not: there, prune and
    `ShareWeights` make a smaller file at no loss (docs/sharing.md).

    Args:
        ratio: buckets as a share of a tensor's weights, above 0 and below 1.
        seed: of the hashes.
        exclude: names or globs of weights or layers to leave alone: "fc", "layer1.*".

    Raises:
        UserError: a setting is out of its range; a name in ``exclude`` fits nothing; the model is
            quantized or shared already, or no weight would take fewer bytes.

    Example:
        >>> import torch, paredown
        >>> model = paredown.capture(torch.nn.Linear(32, 8), (torch.zeros(1, 32),))
        >>> hashed = paredown.HashWeights(1 / 64).apply(model, None)
        >>> len(hashed.state_dict()["weight"].abs().unique())
        4
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    table: ClassVar[tuple[Entry, ...]] = (
        Entry(
            call="HashWeights(0.25)",
            does="each weight is a hashed bucket times a hashed sign; buckets train, and they "
            "and a seed are all that `model.save` keeps",
            pays="the PyTorch runtime's file, to any share of its size",
            does_not="untrained; beside pruning and `ShareWeights` at the same bytes",
        ),
    )

    ratio: float = 0.25
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio: expected above 0 and below 1, got {self.ratio!r}.")
        check_seed("seed", self.seed)
        object.__setattr__(self, "exclude", names_of("exclude", self.exclude))

    def apply(self, model: Model, task: Task, setting: Setting = ALONE) -> Model:
        """A copy whose weights are those of the buckets, with ``shared`` saying which."""
        made = model.copy().eval()
        fold_computed_weights(made)
        for each in shareable(made, self.exclude, "HashWeights"):
            buckets = max(1, round(self.ratio * each.weight.numel()))
            if (each.weight.numel() - buckets) * each.weight.element_size() > NOTE_BYTES:
                keep_zeros(made, each)
                seed = _seed(each.name, self.seed)
                made.shared[each.name] = Sharing(each.name, buckets, seed=seed)
        if not made.shared.keys() - model.shared.keys():
            raise UserError(
                f"HashWeights: changed nothing; no weight is so large that buckets at a ratio of "
                f"{self.ratio:g} would take fewer bytes. Ask for a lower ratio."
            )
        hold(made)
        progress.say(f"  {len(made.shared)} weights hashed to {self.ratio:g} of their number")
        return made


def _seed(name: str, seed: int) -> int:
    """32 bits for each weight, so that no two have their collisions at the same places.

    Example:
        >>> _seed("fc.weight", 0), _seed("fc.weight", 1)
        (4123308186, 2095283611)
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & MASK
