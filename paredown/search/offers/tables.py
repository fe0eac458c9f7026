"""Small weights alone, for models whose tables weigh most."""

from __future__ import annotations

from collections.abc import Sequence

from paredown.graph.sites import sites
from paredown.graph.state import tensor_of
from paredown.search.pieces import make
from paredown.search.proposal import Attempt, Proposal
from paredown.search.situation import Situation


def four_bit_weights(situation: Situation) -> Sequence[Proposal]:
    """Where the runtime can write them, and tables that are looked up are most of the file."""
    if "int4-weights" not in situation.runtime.FORMS or not _tables_weigh_most(situation):
        return []
    attempt = Attempt(
        (make("quantize_weights", bits=4, method="gptq" if situation.calibrates else "rtn"),),
        "4-bit weights, 8-bit tables",
        "most of the file is tables that are looked up; activations stay in float",
        "about a quarter of the tables' bytes, and an eighth of the layers'",
    )
    reason = "tables weigh most: weights alone need be small"
    return [Proposal("4-bit weights", reason, (attempt,))]


def _tables_weigh_most(situation: Situation) -> bool:
    """Whether more than half of the file is tables."""
    graph = situation.model.graph
    tables = {site.weight for site in sites(graph) if site.kind == "embedding"}
    return 2 * sum(tensor_of(graph, t).nbytes for t in tables) > situation.baseline.size_bytes
