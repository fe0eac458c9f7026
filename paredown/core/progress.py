"""Progress of long work: a live bar on a terminal, lines elsewhere, silence by default."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from paredown.core.settings import check_arguments

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


T = TypeVar("T")
LINE_EVERY_S = 15.0

_console: ContextVar[Console | None] = ContextVar("console", default=None)
_bar: ContextVar[Progress | None] = ContextVar("bar", default=None)


@contextlib.contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Show within the block what is being done, as ``paredown.progress``.

    Args:
        console: where; the error stream, or the notebook, by default.

    Example:
        >>> from rich.console import Console
        >>> with shown(Console(no_color=True)):
        ...     say("half done")
        half done
    """
    from rich.console import Console as Where
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    check_arguments(console=(console, Where | None))
    console = console or Where(stderr=True)
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
    tokens = _console.set(console), _bar.set(bar)
    try:
        with bar or contextlib.nullcontext():
            yield
    finally:
        _console.reset(tokens[0])
        _bar.reset(tokens[1])


def say(line: str) -> None:
    """One line to whoever watches."""
    console = _console.get()
    if console is not None:
        console.print(line, highlight=False, markup=False)


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing how far along they are."""
    bar = _bar.get()
    if total is None and isinstance(items, Sized):
        total = len(items)
    if bar is not None:
        try:
            yield from bar.track(items, total=total, description=what)
        finally:  # also where the items are left before their end
            if bar.task_ids:
                bar.remove_task(bar.task_ids[-1])
        return
    last = time.monotonic()
    for count, item in enumerate(items):
        yield item
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            say(f"  {what}: {count + 1}" + (f" of {total}" if total else ""))
