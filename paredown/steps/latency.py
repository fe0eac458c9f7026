"""The least share of multiply-adds to remove for a share of the measured latency."""

from __future__ import annotations

from collections.abc import Callable

from paredown.core.errors import UserError

MEASUREMENTS = 6  # of the latency, each of which exports two files and opens fresh processes
CLOSE = 0.01  # a latency this near to the one asked is not improved on: timing is no finer


def search(removed: Callable[[float], float], asked: float, most: float, looser: str) -> float:
    """The least share of multiply-adds tried, to 3 digits, that removes the latency asked.

    After ``most``, it tries where the line between the nearest tries on both sides meets what
    was asked, since latency mostly follows the multiply-adds, and in turn half way between them,
    since it does not always.

    Args:
        removed: share of multiply-adds -> the share of the latency that goes with it, measured.
        asked: the share of the latency to remove.
        most: the largest share of multiply-adds that can be removed.
        looser: the settings that allow more, for the error.

    Raises:
        UserError: even ``most`` does not remove the latency asked; says what it reaches.

    Example:
        >>> search(lambda share: share / 2, 0.25, 0.9, "round_to")
        0.5
    """
    low, high = (0.0, 0.0), (most, removed(most))  # (share, share of the latency that it removes)
    if high[1] < asked:
        raise UserError(
            f"ratio: a share of {asked:.4g} of the latency was asked; the smallest model that "
            f"these settings allow removes {max(high[1], 0.0):.2g} of it, as measured. Lower the "
            f"ratio, or allow more by {looser}."
        )
    for number in range(MEASUREMENTS - 1):
        span = high[0] - low[0]
        if high[1] - asked <= CLOSE or span < 0.005:
            break
        place = (asked - low[1]) / (high[1] - low[1]) if number % 2 == 0 else 0.5
        share = round(low[0] + span * min(max(place, 0.1), 0.9), 3)  # so that both ends close in
        found = (share, removed(share))
        low, high = (low, found) if found[1] >= asked else (found, high)
    return high[0]
