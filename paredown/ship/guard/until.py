"""Lines that end early where a signal comes, so that what was seen is still told and kept."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Protocol


class Readable(Protocol):
    """What gives lines: a binary file, or a pipe."""

    def readline(self, size: int, /) -> bytes:
        """The next line, at most ``size`` bytes of it; nothing at the end."""


class _Ended(BaseException):
    """Leaves a read that waits; raised by the handler and caught around the read, nowhere else."""


class UntilSignal:
    """Lines as they come, until SIGINT or SIGTERM: then no more, as at a file's end.

    The handler raises only out of a read that waits. Whatever else runs, such as a commit to the
    state file, is finished first. Later signals change nothing: the end is under way.

    Example:
        >>> import io
        >>> lines = UntilSignal(io.BytesIO(b"one\\ntwo\\n"))
        >>> lines.readline(100)
        b'one\\n'
        >>> lines.end(signal.SIGTERM)
        >>> lines.readline(100), int(lines.signal)
        (b'', 15)
    """

    def __init__(self, lines: Readable):
        self.signal = 0  # the first that came
        self._lines, self._waits = lines, False

    def readline(self, size: int, /) -> bytes:
        """The next line, or nothing once a signal has come."""
        try:
            self._waits = True
            text = b"" if self.signal else self._lines.readline(size)
            self._waits = False
        except _Ended:
            return b""
        return text

    def end(self, number: int, frame: Any = None) -> None:
        """The handler of both signals."""
        self.signal = self.signal or number
        if self._waits:
            self._waits = False
            raise _Ended

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, SIGINT and SIGTERM end the lines; for the main thread alone."""
        before = {each: signal.signal(each, self.end) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
