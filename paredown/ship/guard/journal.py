"""The rollout's state on the disk: one SQLite file, one writer, every commit synced.

Events are appended, and a snapshot beside them says where to go on. A record carries its CRC-32.
The newest events are kept; which digests were rolled back is kept for good.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.files import failpoint, sync_folder
from paredown.ship.guard.stages import Event, Stage

KEPT_EVENTS = 10_000
MARK, VERSION = 0x70617265, 1  # SQLite's application_id ("pare") and user_version
POINTS = ("journal-before-commit", "journal-after-commit")
_TABLES = """
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL, crc INTEGER);
CREATE TABLE latches (digest TEXT PRIMARY KEY, text TEXT NOT NULL, crc INTEGER);
CREATE TABLE snapshot (id INTEGER PRIMARY KEY CHECK (id = 1), text TEXT NOT NULL, crc INTEGER);
"""


class Journal:
    """An open state file; one process at a time holds it.

    Make it with `Journal.open`. A write that found no room may be tried again. After any other that
    failed nothing more can be written before the file is opened anew: what a failed fsync has left
    on the disk is not known.

    Example:
        >>> import tempfile
        >>> from paredown.ship.guard.stages import Event, Stage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal.open(Path(folder) / "rollout.db") as journal:
        ...         event = Event(0.0, "roll back", Stage.ROLLED_BACK, 0, "NaN", "guard", "ab12")
        ...         journal.append(event, {"stage": "rolled back"})
        ...     with Journal.open(Path(folder) / "rollout.db") as journal:
        ...         journal.latched("ab12"), journal.snapshot()
        ('NaN', {'stage': 'rolled back'})
    """

    def __init__(self, path: Path, base: sqlite3.Connection, lock: int):
        self.path = path
        self.broken = ""  # why the last write failed
        self._again = False  # whether it may be tried again
        self._base = base
        self._lock = lock
        self._turn = threading.Lock()
        self._events: list[Event] = []
        self._latches: dict[str, str] = {}
        self._snapshot: dict[str, Any] | None = None

    @staticmethod
    def open(path: str | Path) -> Journal:
        """Create the state file, or go on with the one that is there.

        Raises:
            UserError: another process holds it, it is damaged or of something else, or it cannot
                be written. The original alone must serve then: see `Rollout.alone`.
        """
        path = Path(path)
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _locked(path)
            try:
                if not path.exists():
                    _create(path)
                base = _connected(path)
                try:
                    made = Journal(path, base, lock)
                    made._read()
                except BaseException:
                    base.close()
                    raise
            except BaseException:
                os.close(lock)
                raise
        return made

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; nothing can be written afterwards."""
        with self._turn:
            if self._lock >= 0:
                with contextlib.suppress(sqlite3.Error):  # what was committed is on the disk
                    self._base.close()
                os.close(self._lock)
                self._lock = -1
                self.broken, self._again = self.broken or "it is closed", False

    def append(self, event: Event, snapshot: dict[str, Any]) -> None:
        """Add an event and the state after it; when this returns both are on the disk.

        A roll back by its event latches the event's digest.

        Raises:
            UserError: the disk is full or failing: neither is then in the journal.
        """
        with self._turn, self._committed() as base:
            _put(base, "INSERT INTO events (text, crc) VALUES (?, ?)", asdict(event))
            base.execute(
                "DELETE FROM events WHERE id <= (SELECT MAX(id) FROM events) - ?", (KEPT_EVENTS,)
            )
            if event.stage is Stage.ROLLED_BACK:
                latch = {"reason": event.reason, "time_s": event.time_s}
                command = "INSERT OR REPLACE INTO latches (digest, text, crc) VALUES (?, ?, ?)"
                _put(base, command, latch, event.digest)
            _put(base, _SNAPSHOT, snapshot)
        self._events = [*self._events, event][-KEPT_EVENTS:]
        if event.stage is Stage.ROLLED_BACK:
            self._latches[event.digest] = event.reason
        self._snapshot = snapshot

    def save(self, snapshot: dict[str, Any]) -> None:
        """Put a snapshot in place of the last one.

        Raises:
            UserError: as `append`.
        """
        with self._turn, self._committed() as base:
            _put(base, _SNAPSHOT, snapshot)
        self._snapshot = snapshot

    def events(self) -> list[Event]:
        """The newest events, oldest first."""
        return list(self._events)

    def latched(self, digest: str) -> str | None:
        """Why this candidate was rolled back, None where it was not."""
        return self._latches.get(digest)

    def snapshot(self) -> dict[str, Any] | None:
        """The last snapshot, None in a new file."""
        return self._snapshot

    @contextlib.contextmanager
    def _committed(self) -> Iterator[sqlite3.Connection]:
        if self.broken and not self._again:
            raise UserError(f"{self.path}: cannot be written: {self.broken}.")
        try:
            self._base.execute("BEGIN IMMEDIATE")
            yield self._base
            failpoint(POINTS[0])
            self._base.execute("COMMIT")
            failpoint(POINTS[1])
            self.broken = ""
        except (sqlite3.Error, OSError) as error:
            self.broken = getattr(error, "strerror", None) or str(error)
            self._again = _no_room(error)
            with contextlib.suppress(sqlite3.Error):
                self._base.execute("ROLLBACK")
            then = "It is tried again." if self._again else "Restart when the disk is in order."
            raise UserError(
                f"{self.path}: cannot be written: {self.broken}. No weight is raised before it "
                f"can. {then}"
            ) from error

    def _read(self) -> None:
        for text, crc in self._base.execute("SELECT text, crc FROM events ORDER BY id"):
            told = _checked(self.path, text, crc)
            self._events.append(Event(**{**told, "stage": Stage(told["stage"])}))
        for digest, text, crc in self._base.execute("SELECT digest, text, crc FROM latches"):
            self._latches[digest] = str(_checked(self.path, digest + text, crc, text)["reason"])
        for text, crc in self._base.execute("SELECT text, crc FROM snapshot"):
            self._snapshot = _checked(self.path, text, crc)


_PASSING = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
)
_PASSING_IO = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMSIZE,
)
_SNAPSHOT = "INSERT OR REPLACE INTO snapshot (id, text, crc) VALUES (1, ?, ?)"


def _put(base: sqlite3.Connection, command: str, record: dict[str, Any], key: str = "") -> None:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    crc = zlib.crc32((key + text).encode())
    base.execute(command, (key, text, crc) if key else (text, crc))


def _checked(path: Path, covered: str, crc: int, text: str | None = None) -> dict[str, Any]:
    if zlib.crc32(covered.encode()) != crc:
        raise UserError(_damaged(path, "a record's checksum is wrong"))
    told = json.loads(covered if text is None else text)
    if not isinstance(told, dict):
        raise UserError(_damaged(path, "a record is no object"))
    return told


def _damaged(path: Path, how: str) -> str:
    return (
        f"{path}: is damaged: {how}. Which candidates were rolled back is not known, so the "
        "original alone serves. Restore the file, or remove it to begin anew."
    )


def _no_room(error: sqlite3.Error | OSError) -> bool:
    """Whether a write failed before anything was synced: the disk was full, or the file held."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _PASSING or code in _PASSING_IO


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be used: {error.strerror or error}.") from error
    except sqlite3.OperationalError as error:  # full disk, no permission, no such file
        raise UserError(f"{path}: cannot be used: {error}.") from error
    except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(_damaged(path, str(error))) from error


def _create(path: Path) -> None:
    """An empty state file, whole or not there: one of no bytes is a damaged one."""
    temporary = path.parent / f".paredown-{secrets.token_hex(8)}.tmp"
    try:
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as base:
            base.execute("PRAGMA synchronous = FULL")
            base.execute(f"PRAGMA application_id = {MARK}")
            base.execute(f"PRAGMA user_version = {VERSION}")
            base.executescript(_TABLES)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _connected(path: Path) -> sqlite3.Connection:
    if path.stat().st_size == 0:
        raise UserError(_damaged(path, "it is empty"))
    base = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0)
    try:
        marks = [base.execute(f"PRAGMA {name}").fetchone()[0] for name in _MARKS]
        if marks != [MARK, VERSION]:
            raise UserError(f"{path}: is a database of something else. Choose another file.")
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA journal_size_limit = 1048576")
        found = base.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise UserError(_damaged(path, found))
    except BaseException:
        base.close()
        raise
    return base


_MARKS = ("application_id", "user_version")


def _locked(path: Path) -> int:
    """The handle that holds the file's lock as long as it is open, also past a crash."""
    name = path.with_name(path.name + ".lock")
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(
            f"{path}: another process holds it. Wait for it, or choose another file."
        ) from error
    except BaseException:
        os.close(lock)
        raise
    return lock
