"""Range methods by name; adding one is a new file and a line in this dict."""

from __future__ import annotations

from paredown.core.named import named
from paredown.steps.quantization.range_methods import RangeMethod

RANGES = {
    "lp": "paredown.steps.quantization.range_methods:LP",
    "minmax": "paredown.steps.quantization.range_methods:MINMAX",
    "percentile": "paredown.steps.quantization.range_methods:PERCENTILE",
    "entropy": "paredown.steps.quantization.range_methods:ENTROPY",
}


def range_method(name: str) -> RangeMethod:
    """The method of that name.

    Example:
        >>> range_method("lp").wider
        'minmax'
    """
    made: RangeMethod = named(RANGES[name])
    return made
