"""Answers of another process, one line each, within a time."""

from __future__ import annotations

import os
import selectors
import time
from typing import IO

MAX_ANSWER = 2**26  # bytes of one line


class Lines:
    """The lines that come out of a pipe.

    Example:
        >>> reading, writing = os.pipe()
        >>> _ = os.write(writing, b"one" + bytes([10]) + b"tw")
        >>> os.close(writing)
        >>> with os.fdopen(reading, "rb") as pipe:
        ...     lines = Lines(pipe)
        ...     lines.next(1.0), lines.next(1.0)
        (b'one', None)
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe, self._pending = pipe, b""

    def next(self, timeout_s: float) -> bytes | None:
        """The next line without its end; None where the pipe has ended, or the line has none.

        Raises:
            TimeoutError: none came in that many seconds.
        """
        until = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                part = os.read(self._pipe.fileno(), 2**16)
                if not part or len(self._pending) > MAX_ANSWER:
                    return None
                self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line
