"""16-bit floats."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.core.units import human
from paredown.search.pieces import make
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation


def half_floats(situation: Situation) -> Sequence[Proposal]:
    """Wherever the runtime can write them; they need no data."""
    if "fp16" not in situation.runtime.FORMS:
        return []
    attempt = Attempt(
        (make("cast", dtype="fp16"),),
        "16-bit floats",
        "half the bytes at almost no loss; CPUs mostly compute in 32 bits, so rarely faster",
        f"about {human('size', situation.baseline.size_bytes * 0.5)} (0.50x)",
    )
    return [Proposal("fp16", "the last resort for size: the smallest loss", (attempt,))]
