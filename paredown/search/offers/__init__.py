"""What a plan can offer; adding one is a new file here and a line in this tuple.

An offer looks at the situation, and makes proposals for it or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paredown.core.named import named
from paredown.search.proposal import Proposal
from paredown.search.situation import Situation

Offer = Callable[[Situation], Sequence[Proposal]]

OFFERS = (  # the most promising first
    "paredown.search.offers.students:student",
    "paredown.search.offers.few_bits:four_bits",
    "paredown.search.offers.integers:alone",
    "paredown.search.offers.smaller:factored",
    "paredown.search.offers.smaller:narrow",
    "paredown.search.offers.students:of_zoo",
    "paredown.search.offers.integers:trained",
    "paredown.search.offers.integers:alone_though_too_little",
    "paredown.search.offers.integers:mixed",
    "paredown.search.offers.few_bits:signs",
    "paredown.search.offers.few_values:shared_and_hashed",
    "paredown.search.offers.tables:four_bit_weights",
    "paredown.search.offers.without_data:dynamic",
    "paredown.search.offers.without_data:eight_bit_weights",
    "paredown.search.offers.without_data:four_bit_weights",
    "paredown.search.offers.half_floats:half_floats",
)


def offers() -> list[Offer]:
    """All of them, in their order."""
    return [named(each) for each in OFFERS]
