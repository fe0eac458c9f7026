"""What a step found out besides its result, kept for the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_found: ContextVar[list[dict[str, Any]] | None] = ContextVar("found", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[dict[str, Any]]]:
    """Everything that is noted within the block, as it comes.

    Example:
        >>> with collected() as found:
        ...     note("curve", points=[1, 2])
        >>> found
        [{'kind': 'curve', 'points': [1, 2]}]
    """
    found: list[dict[str, Any]] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def note(kind: str, **facts: Any) -> None:
    """Keep facts that JSON can hold; without anyone who collects them they go."""
    found = _found.get()
    if found is not None:
        found.append({"kind": kind, **facts})
