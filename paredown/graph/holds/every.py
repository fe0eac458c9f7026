"""All that later steps must hold, in the order in which it is held."""

from paredown.graph.holds.hold import Hold
from paredown.graph.holds.shared_store import SharedValues
from paredown.graph.holds.zeros import PrunedZeros
from paredown.graph.parts import Parts

HOLDS: tuple[Hold, ...] = (PrunedZeros(), SharedValues())


def held_names(model: Parts) -> set[str]:
    """The names of the parameters of which something is held."""
    return {name for hold in HOLDS for name in getattr(model, hold.field)}


def forget(model: Parts, name: str) -> None:
    """A parameter is gone, or another thing now: nothing is held of it, in place."""
    for hold in HOLDS:
        getattr(model, hold.field).pop(name, None)
