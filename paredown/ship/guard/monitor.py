"""Reads answers as lines of JSON, and writes decisions as lines of JSON when they change."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from paredown.core.errors import UserError
from paredown.ship.guard.bound import Bound
from paredown.ship.guard.guard import Guard
from paredown.ship.guard.lines import LONGEST, Line, read_line
from paredown.ship.guard.policy import Policy
from paredown.ship.guard.stages import Event
from paredown.ship.guard.until import Readable
from paredown.ship.guard.webhook import Webhook

LOOKED_BACK_S = 3600.0  # of a longer gap between two lines, what is gone through by the second


class LineClock:
    """A clock that goes by the lines' own times, and never back.

    Example:
        >>> clock = LineClock()
        >>> clock.now_s = 5.0
        >>> clock()
        5.0
    """

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def monitor(
    lines: Readable,
    out: TextIO,
    bound: Bound,
    *,
    policy: Policy,
    digest: str,
    state: Path | None = None,
    webhook: Webhook | None = None,
    replay: bool = False,
) -> bool:
    """Guard by the lines until they end; whether the candidate was rolled back.

    A line that cannot be read is counted and told, and never ends it.

    Args:
        lines: as `paredown.ship.guard.lines` says, one object each.
        out: takes one object for each event, and one at the end.
        replay: whether the time is each line's ``time_s``; else it is now.

    Raises:
        UserError: the state file cannot be used.
    """

    def tell(event: Event) -> None:
        told = {**event_json(event)}
        print(json.dumps(told), file=out, flush=True)
        if webhook is not None:
            webhook.send(told)

    clock, counts = LineClock(), _Counts()
    read = counts.read(lines)
    if replay:
        read = _from_the_first(read, clock)
    clocks = (clock, clock) if replay else (time.time, time.monotonic)
    guard = Guard(bound, policy, digest, state, tell, *clocks)
    if guard.problem:
        raise UserError(guard.problem)
    try:
        if replay:
            _replay(read, guard, clock)
        else:
            _follow(read, guard)
    finally:
        guard.close()
        if webhook is not None:
            webhook.close()
    status = guard.status()
    ended = {"kind": "end", "stage": status["stage"], "weight": status["weight"]}
    ended |= counts.told()
    if webhook is not None:
        ended |= {"alerts_failed": webhook.failed + webhook.dropped}
    print(json.dumps(ended), file=out, flush=True)
    return bool(status["stage"] == "rolled back")


def event_json(event: Event) -> dict[str, Any]:
    """An event as the monitor tells it.

    Example:
        >>> from paredown.ship.guard.stages import Stage
        >>> event = Event(1.0, "advance", Stage.CANARY, 100, "all is well", "guard", "ab")
        >>> event_json(event)["share"]
        0.01
    """
    return {
        "time_s": event.time_s,
        "kind": event.kind,
        "stage": str(event.stage),
        "share": event.weight / 10_000,
        "reason": event.reason,
        "by": event.by,
        "digest": event.digest,
    }


def _from_the_first(lines: Iterator[Line], clock: LineClock) -> Iterator[Line]:
    """The same lines, once the clock stands at the first one's time."""
    first = next(lines, None)
    if first is None:
        return lines
    clock.now_s = first.time_s or 0.0
    return itertools.chain((first,), lines)


def _follow(lines: Iterable[Line], guard: Guard) -> None:
    with guard:  # looks once a second, also while no line comes
        for line in lines:
            _show(guard, line)


def _replay(lines: Iterable[Line], guard: Guard, clock: LineClock) -> None:
    """Look once a second of the lines' time; a silence in them is looked at as it was."""
    looked = None
    for line in lines:
        if line.time_s is not None:
            looked = line.time_s if looked is None else max(looked, line.time_s - LOOKED_BACK_S)
            while line.time_s - looked >= 1.0:
                looked = min(line.time_s, looked + 1.0)
                clock.now_s = looked
                guard.look()
            clock.now_s = max(clock.now_s, line.time_s)
        _show(guard, line)


def _show(guard: Guard, line: Line) -> None:
    if line.gauges:
        guard.gauge(**line.gauges)
    if line.observation is not None:
        guard.observe(line.observation)


class _Counts:
    """Lines, good and bad."""

    def __init__(self) -> None:
        self.lines = self.bad = 0
        self.first = ""

    def read(self, lines: Readable) -> Iterator[Line]:
        while text := lines.readline(LONGEST + 2):
            if not text.strip():
                continue
            self.lines += 1
            try:
                yield read_line(text)
            except ValueError as error:
                self.bad += 1
                self.first = self.first or f"line {self.lines}: {error}"

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = {"lines": self.lines, "bad_lines": self.bad}
        return told | ({"first_bad": self.first} if self.bad else {})
