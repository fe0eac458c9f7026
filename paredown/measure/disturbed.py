"""Whether a round of timing was disturbed: by other programs, by heat, or by a slow processor."""

from __future__ import annotations

from collections.abc import Sequence

OTHERS = 0.5  # of the cores, which other programs may take at most
SPEED = 0.85  # of the highest frequency, from which on a processor is not slowed down
LEAST_S = 0.1  # a shorter time has too few ticks of the system's clock to judge by


def disturbed(conditions: Sequence[dict[str, float]]) -> str:
    """What disturbed a round, in words; "" where nothing did, or the device does not tell.

    Args:
        conditions: of each time that a file was timed in the round, as `Opened` has them.

    Example:
        >>> quiet = {"seconds": 1.0, "cores": 2.0, "others": 0.1, "throttles": 0.0}
        >>> disturbed([quiet])
        ''
        >>> disturbed([quiet | {"others": 1.6}])
        'other programs took 1.6 of 2 cores'
        >>> disturbed([quiet | {"throttles": 3.0}])
        'the processor was throttled for its heat'
        >>> disturbed([quiet | {"speed": 0.6}])
        'the processor ran at 60% of its highest frequency'
    """
    told = [each for each in conditions if "others" in each]
    seconds = sum(each["seconds"] for each in told)
    if any(each.get("throttles", 0) > 0 for each in conditions):
        return "the processor was throttled for its heat"
    if seconds >= LEAST_S:
        others = sum(each["others"] * each["seconds"] for each in told) / seconds
        cores = told[0]["cores"]
        if others > OTHERS * cores:
            return f"other programs took {others:.1f} of {cores:.0f} cores"
    speeds = [each["speed"] for each in conditions if "speed" in each]
    if speeds and max(speeds) < SPEED:
        return f"the processor ran at {100 * max(speeds):.0f}% of its highest frequency"
    return ""


def told(disturbances: Sequence[str], rounds: int) -> str:
    """What disturbed the rounds that count, in one sentence.

    Example:
        >>> told(["", "the processor was throttled for its heat"], 2)
        'disturbed in 1 of 2 rounds: the processor was throttled for its heat'
        >>> told(["", ""], 2)
        'quiet'
    """
    found = [each for each in disturbances if each]
    if not found:
        return "quiet"
    return f"disturbed in {len(found)} of {rounds} rounds: {found[-1]}"
