"""Quantities with their units: read from a person's text, and written for one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from paredown.core.errors import UserError
from paredown.core.settings import check_fields


@dataclass(frozen=True)
class Limit:
    """A bound on a quantity: absolute in its base unit, or relative to the baseline's."""

    value: float
    relative: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def absolute(self, baseline: float) -> float:
        return self.value * baseline if self.relative else self.value


_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
_PER_SECOND = {"/s": 1.0, "/min": 1 / 60}
_MILLIJOULES = {"uj": 1e-3, "µj": 1e-3, "mj": 1.0, "j": 1e3}
_UNITS: dict[str, tuple[dict[str, float], str]] = {
    "size": (_BYTES, '"60KB", "500 KiB", "1.5 MB" or "0.3x" of the original'),
    "memory": (_BYTES, '"20MB", "64 MiB" or "0.5x" of the original'),
    "latency": (_MILLISECONDS, '"2ms", "150us" or "0.7x" of the original'),
    "throughput": (_PER_SECOND, '"500/s" or "2x" of the original'),
    "energy": (_MILLIJOULES, '"5mJ", "0.1 J" or "0.5x" of the original, per inference'),
}
GOALS = ("size", "latency", "memory", "throughput", "energy")


def parse_limit(goal: str, text: str | float | Limit) -> Limit:
    """A limit from human units; plain numbers are refused, since their unit would be a guess.

    Raises:
        UserError: the text is not a positive finite quantity in a known unit.

    Example:
        >>> parse_limit("size", "500 KiB")
        Limit(value=512000.0, relative=False)
        >>> parse_limit("latency", "0.7x")
        Limit(value=0.7, relative=True)
    """
    if isinstance(text, Limit):
        return text
    units, forms = _UNITS[goal]
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e[+-]?\d+)?\s*([a-zµ/]+)\s*", str(text).lower())
    if match:
        number = float(match[1] + (match[2] or ""))
        if 0 < number < math.inf and match[3] == "x":
            return Limit(number, relative=True)
        if 0 < number < math.inf and match[3] in units:
            return Limit(number * units[match[3]])
    raise UserError(f"{goal}: cannot read {text!r}; write it as {forms}.")


def parse_drop(text: str | float) -> float:
    """The allowed drop of the score as a fraction: "1%" and "0.01" both mean one point.

    Example:
        >>> parse_drop("2%"), parse_drop("0.5 points"), parse_drop(0.01)
        (0.02, 0.005, 0.01)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)(e-?\d+)?\s*(%|points?|)\s*", str(text).lower())
    if match:
        value = float(match[1] + (match[2] or "")) * (0.01 if match[3] else 1.0)
        if value < 1:
            return value
    raise UserError(
        f'max_drop: cannot read {text!r}; write it as "1%", "0.5 points" or "0.01", below 100%.'
    )


def amount(value: float, unit: str) -> str:
    """Three significant digits and a unit, "" where there is none.

    Example:
        >>> amount(1.0, "points"), amount(0.5, "points"), amount(0.000776036, "")
        ('1 point', '0.5 points', '0.000776')
        >>> amount(1234.5, "dB")
        '1,234 dB'
    """
    number = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}".strip()


def human(goal: str, value: float) -> str:
    """A quantity with its unit, three significant digits.

    Example:
        >>> human("size", 1234567), human("latency", 0.0421), human("throughput", 1530.2)
        ('1.23 MB', '42.1 us', '1530 /s')
        >>> human("count", 85200), human("count", 960)
        ('85.2 k', '960')
    """
    if goal == "count":
        for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value:.0f}"
    if goal in ("size", "memory"):
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value:.0f} B"
    if goal == "latency":
        return f"{value:.3g} ms" if value >= 0.1 else f"{value * 1e3:.3g} us"
    if goal == "throughput":
        return f"{value:.0f} /s" if value >= 100 else f"{value:.3g} /s"
    return f"{value:.3g} mJ"
