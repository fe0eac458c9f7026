"""Weights that are few values, for a runtime whose file keeps rounded ones in float."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.search.pieces import asked, make, recovery
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation


def shared_and_hashed(situation: Situation) -> Sequence[Proposal]:
    """Where the file keeps shared values once, a size is asked for, and they can be trained."""
    keeps_once = situation.runtime.INT8_BYTES is None
    if not keeps_once or situation.goals.size is None or not situation.trains:
        return []
    wanted = asked(situation.goals)
    shared = Attempt(
        (make("share_weights", k=16), recovery(situation, 5e-4)),
        "Sixteen values a layer, trained",
        "the file keeps a number of four bits for each weight, in a byte",
        "about a quarter of the weights' bytes",
    )
    hashed = Attempt(
        (make("hash_weights", ratio=1 / 64), recovery(situation, 1e-3)),
        "One value for 64 weights, by a hash, trained",
        "the file keeps the values and the hash's seed",
        "about a fortieth of the weights' bytes",
    )
    return [
        Proposal("shared values", f"{wanted}: weights that are few values", (shared,)),
        Proposal("hashed values", f"{wanted}: the smallest, for the most training", (hashed,)),
    ]
