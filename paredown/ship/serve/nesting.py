"""The nesting of a model's outputs, as the names in its file tell it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def of_names(names: Sequence[str]) -> Any:
    """One tensor, a tuple or a dict, as `paredown.graph.structure` has them.

    Example:
        >>> of_names(["output"]), of_names(["0", "1"]), of_names(["logits"])
        ('*', {'tuple': ['*', '*']}, {'dict': {'logits': '*'}})
    """
    if list(names) == ["output"]:
        return "*"
    if list(names) == [str(place) for place in range(len(names))]:
        return {"tuple": ["*"] * len(names)}
    return {"dict": dict.fromkeys(names, "*")}
