"""Quantities and changes as a person reads them."""

from __future__ import annotations

import math

from paredown.core.units import human

WORDS = {
    "size": ("smaller", "larger"),
    "memory": ("less", "more"),
    "latency": ("faster", "slower"),
    "throughput": ("more", "less"),
    "energy": ("less", "more"),
}


def quantity(value: float | None, goal: str) -> str:
    """A figure with its unit and a true minus sign, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return human(goal, value).replace(" us", " µs").replace("-", "−")


def short(name: object, length: int = 56) -> str:
    """A long name with its middle left out.

    Example:
        >>> short("encoder.layers.11.attention", 15)
        'encoder…tention'
    """
    words = str(name)
    half = (length - 1) // 2
    return words if len(words) <= length else f"{words[:half]}…{words[-half:]}"


def score(value: float | None, points: bool) -> str:
    """A score: per cent where it lies in [0, 1].

    Example:
        >>> score(0.9124, True), score(-31.25, False)
        ('91.24%', '−31.25')
        >>> score(2e-06, True), score(0.0, True)
        ('0.0002%', '0.00%')
    """
    if value is None:
        return "–"
    return (f"{_hundredths(value)}%" if points else f"{value:.4g}").replace("-", "−")


def change(value: float | None, points: bool, unit: bool = True) -> str:
    """A signed difference of scores, in points where they lie in [0, 1].

    Example:
        >>> change(-0.0042, True), change(0.5, False), change(0.0, True, unit=False)
        ('−0.42 points', '+0.5', '0.00')
        >>> change(-3e-06, True)
        '−0.0003 points'
    """
    if value is None:
        return "–"
    words = _hundredths(value, "+") if points else f"{value:+.3g}"
    if not float(words):
        words = words.lstrip("+-")
    return words.replace("-", "−") + (" points" if points and unit else "")


def _hundredths(value: float, sign: str = "") -> str:
    """With two places; what these would make zero has two digits."""
    words = f"{100 * value:{sign}.2f}"
    return f"{100 * value:{sign}.2g}" if value and not float(words) else words


def times(ratio: float) -> str:
    """A ratio with three digits.

    Example:
        >>> times(1.3), times(12.04), times(148.2)
        ('1.30×', '12.0×', '148×')
    """
    digits = 2 if ratio < 9.995 else 1 if ratio < 99.95 else 0
    return f"{ratio:.{digits}f}×"


def ratio(goal: str, before: float | None, after: float | None) -> tuple[str, str, str]:
    """How many times better or worse, as (number, word, "better" | "worse" | "").

    Example:
        >>> ratio("size", 1000, 250), ratio("latency", 1.0, 2.0), ratio("size", None, 1.0)
        (('4.00×', 'smaller', 'better'), ('2.00×', 'slower', 'worse'), ('', '', ''))
    """
    if not before or not after or before < 0 or after < 0:
        return "", "", ""
    gain = after / before if goal == "throughput" else before / after
    if 0.995 < gain < 1.005:
        return "the same", "", ""
    better, worse = WORDS[goal]
    return (times(gain), better, "better") if gain > 1 else (times(1 / gain), worse, "worse")


def axis_unit(goal: str, top: float) -> tuple[str, float]:
    """The unit in which ``top`` reads best, and its size."""
    if goal == "latency":
        return ("ms", 1.0) if top >= 0.1 else ("µs", 1e-3)
    units = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
    return next((found for found in units if top >= found[1]), ("B", 1.0))
