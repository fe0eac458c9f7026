"""What a plan can offer. An offer looks at the situation, and makes proposals for it or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paredown.search.offers import few_bits, few_values, half_floats, integers, smaller, tables
from paredown.search.proposal import Proposal
from paredown.search.situation import Situation

OFFERS: tuple[Callable[[Situation], Sequence[Proposal]], ...] = (  # the most promising first
    few_bits.four_bits,
    integers.alone,
    smaller.factored,
    smaller.narrow,
    integers.trained,
    integers.alone_though_too_little,
    integers.mixed,
    few_bits.signs,
    few_values.shared_and_hashed,
    tables.four_bit_weights,
    half_floats.half_floats,
)
