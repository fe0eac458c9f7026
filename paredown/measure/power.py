"""Energy by a power meter's record: times and watts in a CSV file."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paredown.core.errors import UserError

COLUMNS = ("time", "watts")
LONGEST_GAP_S = 2.0  # between two readings, beyond which nothing is known of the time between


@dataclass(frozen=True)
class Power:
    """Readings of a power meter: seconds since 1970, ascending, and watts, (N,) each."""

    times_s: np.ndarray
    watts: np.ndarray

    def joules(self, began_s: float, ended_s: float) -> float | None:
        """The energy between two times, the power going straight from reading to reading; None
        where the readings do not span them.

        Example:
            >>> Power(np.array([0.0, 1.0, 2.0]), np.array([2.0, 2.0, 4.0])).joules(0.5, 2.0)
            4.0
        """
        if began_s < self.times_s[0] or ended_s > self.times_s[-1]:
            return None
        inside = (self.times_s > began_s) & (self.times_s < ended_s)
        at = np.concatenate([[began_s], self.times_s[inside], [ended_s]])
        first = np.searchsorted(self.times_s, began_s, "right") - 1
        last = np.searchsorted(self.times_s, ended_s, "left")
        if np.diff(self.times_s[first : last + 1]).max(initial=0.0) > LONGEST_GAP_S:
            return None
        return float(np.trapezoid(np.interp(at, self.times_s, self.watts), at))

    def energy_mj(self, windows: Sequence[tuple[float, float, int]]) -> float | None:
        """Millijoules per inference over the times that a file was timed, each with its count of
        inferences; None where the readings do not span all of them.

        It is all that the meter sees: the device with what it takes while idle.

        Example:
            >>> Power(np.array([0.0, 2.0]), np.array([3.0, 3.0])).energy_mj([(0.5, 1.5, 1000)])
            3.0
        """
        spent = [self.joules(began, ended) for began, ended, _ in windows]
        known = [joules for joules in spent if joules is not None]
        if not windows or len(known) < len(spent):
            return None
        return 1000 * sum(known) / sum(count for _, _, count in windows)


def read(path: Path, least: int = 2) -> Power:
    """The readings in a CSV file with the columns ``time``, seconds since 1970 or ISO 8601, and
    ``watts``, in any order among others.

    Args:
        least: readings that there must be.

    Raises:
        UserError: it cannot be read, lacks a column, or holds something else than numbers; names
            the line.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                has = ", ".join(names) or "none"
                raise UserError(
                    f"{path}: expected a CSV file with the columns time and watts, got {has}."
                )
            found = [
                _reading(path, rows.line_num, *(row[names[c]] for c in COLUMNS)) for row in rows
            ]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV file: {error}.") from error
    if len(found) < least:
        raise UserError(f"{path}: expected at least {least} readings, got {len(found)}.")
    table = np.array(sorted(found)).reshape(-1, 2)
    return Power(table[:, 0], table[:, 1])


def _reading(path: Path, line: int, time: str | None, watts: str | None) -> tuple[float, float]:
    try:
        made = _seconds(str(time)), float(str(watts))
    except ValueError:
        made = np.nan, np.nan
    if not np.isfinite(made).all() or made[1] < 0:
        raise UserError(
            f"{path}: line {line}: expected a time and watts, 0 or more, got {time!r}, {watts!r}."
        )
    return made


def _seconds(text: str) -> float:
    """Seconds since 1970; a time without a zone is this machine's.

    Example:
        >>> _seconds("12.5"), _seconds("1970-01-01T00:01:00+00:00")
        (12.5, 60.0)
    """
    try:
        return float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text.strip()).timestamp()
