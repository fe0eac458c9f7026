"""A change of speed, as it is worded everywhere."""

from __future__ import annotations


def speed_change(speedup: float, low: float, high: float) -> tuple[str, str]:
    """How many times faster or slower, in two parts; an interval that holds 1 is no measurable
    speed-up.

    Args:
        speedup: the time before over the time after.
        low, high: its interval.

    Example:
        >>> speed_change(1.84, 1.79, 1.90), speed_change(0.5, 0.4, 0.6)
        (('1.84x', 'faster'), ('2.00x', 'slower'))
        >>> speed_change(0.99, 0.97, 1.01)
        ('no measurable', 'speed-up')
    """
    if low <= 1 <= high:
        return "no measurable", "speed-up"
    word = "faster" if low > 1 else "slower"
    estimate, *_ = away_from_one(speedup, low, high)
    return f"{estimate}x", word


def away_from_one(speedup: float, low: float, high: float) -> tuple[str, str, str]:
    """A ratio and its interval that does not hold 1, as numbers above 1, with as many decimals as
    tell the interval from 1.

    Example:
        >>> away_from_one(0.5, 0.4, 0.6), away_from_one(1.003, 1.0012, 1.0049)
        (('2.00', '1.67', '2.50'), ('1.003', '1.001', '1.005'))
        >>> away_from_one(12.04, 11.0, 13.0)
        ('12.0', '11.0', '13.0')
    """
    if high < 1:
        speedup, low, high = 1 / speedup, 1 / high, 1 / low
    most = 2 if speedup < 9.995 else 1 if speedup < 99.95 else 0
    digits = next((d for d in range(most, 6) if round(low, d) > 1), 6)
    return f"{speedup:.{digits}f}", f"{low:.{digits}f}", f"{high:.{digits}f}"
