"""When enough rounds are timed: what is asked of the speed is answered, and more would not turn it.

Whoever looks again and again and stops at the first interval that excludes 1 finds too many
speed-ups. So a look before the last round asks for far more than the last one does: an interval of
99.9 % (Haybittle 1971, British Journal of Radiology 44:793; Peto 1976, British Journal of Cancer
34:585). All looks together then err in 0.1 % each more than the 95 % of the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from paredown.measure import speedups

FIRST, EVERY = 4, 2  # rounds before the first look, and between looks
SURE = 0.999
WIDE = 1.2  # the upper end of a 95 % interval over its lower one, from which on it tells little


@dataclass(frozen=True)
class Question:
    """Whether ``after`` runs more than ``factor`` times as fast as ``before``, by names of files.

    Example:
        >>> Question("original", "candidate", 1.0).factor
        1.0
    """

    before: str
    after: str
    factor: float


def look(done: int) -> bool:
    """Whether to look after so many rounds.

    Example:
        >>> [done for done in range(11) if look(done)]
        [4, 6, 8, 10]
    """
    return done >= FIRST and (done - FIRST) % EVERY == 0


def sharp(rounds: Mapping[str, Sequence[ArrayLike]]) -> bool:
    """Whether how fast each file runs beside the first is known well enough: as long as another
    process disturbs the machine it is not, and more rounds help.

    That they end by the width of an interval and not by where it lies favours no answer.

    Example:
        >>> steady, shaken = [[4.0], [4.1], [4.0], [4.1]], [[2.0], [2.1], [5.0], [2.0]]
        >>> sharp({"original": steady, "candidate": steady}), sharp({"a": steady, "b": shaken})
        (True, False)
    """
    first, *others = rounds.values()
    found = [speedups.median_ratio(first, other) for other in others]
    return all(each.high <= WIDE * each.low for each in found)


def answered(questions: Sequence[Question], rounds: Mapping[str, Sequence[ArrayLike]]) -> bool:
    """Whether each question has an answer that further rounds would hardly turn.

    Args:
        rounds: latencies of each file, an array for each round, as `speedups.median_ratio` takes
            them.

    Example:
        >>> slow, fast = [[4.0, 4.2], [4.1, 4.0], [4.2, 4.1]], [[2.0, 2.1], [2.0, 2.0], [2.1, 2.0]]
        >>> timed = {"original": slow, "candidate": fast}
        >>> answered([Question("original", "candidate", 1.0)], timed)
        True
        >>> answered([Question("original", "candidate", 2.0)], timed)
        False
    """
    pairs = {(each.before, each.after) for each in questions}
    found = {
        (before, after): speedups.median_ratio(rounds[before], rounds[after], SURE)
        for before, after in pairs
    }
    return all(
        not found[each.before, each.after].low <= each.factor <= found[each.before, each.after].high
        for each in questions
    )
