"""Goals that nothing can meet here, told before any work."""

from __future__ import annotations

from paredown.core.goals import Goals
from paredown.core.task import Target
from paredown.core.units import Limit, human
from paredown.measure.memory import Floor, floor


def unreachable(goals: Goals, target: Target, size_bytes: int, graph_bytes: int) -> list[str]:
    """A sentence for each goal that no step can meet on this target.

    Args:
        size_bytes: of the exported original.
        graph_bytes: what of that are no weights.
    """
    found = [_size(goals.size, size_bytes, graph_bytes)]
    if goals.memory is not None or goals.energy is not None:
        lowest = floor(target)
        found.append(_memory(goals.memory, target, lowest))
        if goals.energy is not None and not lowest.metered:
            found.append(
                "energy: no meter can be read here, so this goal cannot be met; leave it out, or "
                "measure on a machine that lets you read /sys/class/powercap."
            )
    return [sentence for sentence in found if sentence]


def _size(limit: Limit | str | None, whole: int, graph: int) -> str:
    """Steps change weights; of the graph around them they change little."""
    if not isinstance(limit, Limit) or limit.absolute(whole) > graph:
        return ""
    return (
        f"size: the goal is {human('size', limit.absolute(whole))}, and of the original's "
        f"{human('size', whole)} {human('size', graph)} are the graph without any weights; ask for "
        "more than that, or for fewer layers."
    )


def _memory(limit: Limit | str | None, target: Target, lowest: Floor) -> str:
    if not isinstance(limit, Limit):
        return ""
    if lowest.memory_bytes is None:
        return "memory: this system does not tell a process's peak, so its goal cannot be met."
    if limit.relative or limit.value > lowest.memory_bytes:
        return ""
    return (
        f"memory: the goal is {human('memory', limit.value)}, and {target.runtime} takes "
        f"{human('memory', lowest.memory_bytes)} with a model of one op; ask for more than that, "
        'or for a share of what the model adds, such as "0.5x".'
    )
