"""The run folder: what is finished stays finished, whenever and however the run is stopped.

``identity.json`` says of what the run is, ``ledger.jsonl`` what has happened (append-only, one
record a line, ``length crc32 json``), and ``stages/<sha256><suffix>`` holds what was made.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.files import (
    Data,
    is_temporary,
    read_parts,
    sha256,
    sync_folder,
    write_atomically,
    write_synced,
    write_together,
)
from paredown.core.units import human
from paredown.run.identity import IDENTITY, check_identity
from paredown.targets.artifact import digest, parts

RECORDS, STAGES, LOCK = "ledger.jsonl", "stages", ".lock"
MODEL, RUN = ".safetensors", ".json"  # the suffixes of stages that hold models and runs
STAGE = "stage"  # the kind of the records that `Ledger.finish` writes


@dataclass
class Ledger:
    """An open run folder; one process at a time holds it. Use it in a ``with`` block.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Ledger.open(Path(folder), {"seed": 0}) as ledger:
        ...         key = stage_key({"step": "PruneChannels(0.2)", "after": ""})
        ...         sha256 = ledger.put(b"the pruned model", ".safetensors")
        ...         ledger.finish(key, {"stage": sha256, "suffix": ".safetensors", "kept": True})
        ...     with Ledger.open(Path(folder), {"seed": 0}) as ledger:
        ...         ledger.done(key)["kept"]
        True
    """

    folder: Path
    _records: list[dict[str, Any]] = field(repr=False)
    _size: int  # bytes of the records that are known to be whole
    _handle: int  # of the ledger, opened to append
    _lock: int
    _broken: str = ""  # why nothing more can be written

    @staticmethod
    def open(folder: Path, identity: dict[str, Any]) -> Ledger:
        """Create the run folder, or go on in one that was made for the same ``identity``.

        Args:
            identity: what every stage depends on, as JSON: model, data fingerprints, seeds,
                library versions.

        Raises:
            UserError: another run holds the folder, it was made for another identity, it holds
                other files, it is damaged, or it cannot be written.
        """
        with _explained(folder):
            _refuse_foreign(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
            try:
                check_identity(folder, json.loads(_canonical(identity)))
                _remove_unfinished(folder)
                records, size, handle = _opened(folder / RECORDS)
            except BaseException:
                os.close(lock)
                raise
        return Ledger(folder, records, size, handle, lock)

    @staticmethod
    def reopen(folder: Path) -> Ledger:
        """Open a run folder as it is, whatever it was made for.

        Raises:
            UserError: as `open`, or it is no run folder.
        """
        try:
            identity = json.loads((folder / IDENTITY).read_bytes())["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: is no run folder: {IDENTITY} cannot be read.") from error
        return Ledger.open(folder, identity)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock; nothing can be written afterwards."""
        if self._lock >= 0:
            os.close(self._handle)
            os.close(self._lock)
            self._handle = self._lock = -1
            self._broken = self._broken or "it is closed"

    def append(self, kind: str, fields: dict[str, Any]) -> None:
        """Add one record, ``{"kind": kind, **fields}``; when this returns it is on the disk.

        Raises:
            UserError: the disk is full or failing. The record is then not in the ledger, and
                nothing more can be added before the folder is opened anew.
        """
        if "kind" in fields:
            raise ValueError("fields: 'kind' is the name of the record's kind.")
        path = self.folder / RECORDS
        if self._broken:
            raise UserError(f"{path}: cannot be written: {self._broken}.")
        text = _canonical({"kind": kind, **fields})
        line = _line(text)
        try:
            write_synced(self._handle, line, "ledger")
        except OSError as error:
            self._broken = error.strerror or str(error)
            with contextlib.suppress(OSError):  # if this fails too, the next open cuts it off
                os.ftruncate(self._handle, self._size)
            raise UserError(
                f"{path}: cannot be written: {self._broken}. What was finished before is kept; "
                "start the same run again when the disk is in order."
            ) from error
        self._size += len(line)
        self._records.append(json.loads(text))

    def records(self) -> list[dict[str, Any]]:
        """Every record, oldest first; a copy."""
        return copy.deepcopy(self._records)

    def put(self, data: Data, suffix: str) -> str:
        """Keep ``data`` as a stage and return its SHA-256; the same bytes are kept once.

        Args:
            data: what the file holds; its parts are gone through twice.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        found = sha256(data)
        if self.get(found, suffix) is None:
            write_atomically(self._stage(found, suffix), data)
        return found

    def keep(self, artifact: Path) -> str:
        """Keep an exported file and its companions as one stage; returns its digest.

        Raises:
            UserError: as `put`.
        """
        with _explained(artifact):
            found = digest(artifact)
            if self.get(found, artifact.suffix) is None:
                stage = parts(self._stage(found, artifact.suffix))
                given = map(read_parts, parts(artifact))
                write_together(dict(zip(stage, given, strict=True)))
        return found

    def get(self, sha256: str, suffix: str) -> Path | None:
        """The file of a stage, its digest checked; None, and deleted, where it is damaged."""
        path = self._stage(sha256, suffix)
        with _explained(path):
            if not path.is_file():
                return None
            whole = all(part.is_file() for part in parts(path))
            if whole and digest(path) == sha256:
                return path
            progress.say(f"{path}: is damaged; it will be made again.")
            for part in parts(path):
                part.unlink(missing_ok=True)
        return None

    def _stage(self, sha256: str, suffix: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not re.fullmatch(r"[\w.-]*", suffix):
            raise UserError(f"{self.folder}: {sha256 + suffix!r} is not the name of a stage.")
        return self.folder / STAGES / f"{sha256}{suffix}"

    def done(self, key: str) -> dict[str, Any] | None:
        """The last record that `finish` wrote for ``key``, if its stage is still there and good."""
        for record in reversed(self._records):
            if record["kind"] == STAGE and record.get("key") == key:
                sha256 = record.get("stage", "")
                if sha256 and self.get(sha256, record.get("suffix", "")) is None:
                    return None
                return copy.deepcopy(record)
        return None

    def finish(self, key: str, record: dict[str, Any]) -> None:
        """Note that the stage ``key`` is finished.

        Args:
            key: from `stage_key`.
            record: anything, as JSON, with ``stage`` (what `put` returned, or "" where the stage
                made no file) and ``suffix``.
        """
        if "key" in record:
            raise ValueError("record: 'key' is the name of the stage's key.")
        self.append(STAGE, {"key": key, **record})

    def check_space(self, needed_bytes: int) -> None:
        """Refuse a long step that could not keep its result.

        Raises:
            UserError: less than ``needed_bytes`` is free where the run folder is.
        """
        with _explained(self.folder):
            free = shutil.disk_usage(self.folder).free
        if free < needed_bytes:
            raise UserError(
                f"{self.folder}: {human('size', needed_bytes)} of free space are needed for the "
                f"next step, and {human('size', free)} are free. Make room, or choose an --out "
                "on another disk; what was finished is kept."
            )


def stage_key(parts: dict[str, Any]) -> str:
    """SHA-256 over everything a stage depends on, the same whatever the order of the keys.

    Example:
        >>> stage_key({"step": "Cast", "seed": 0}) == stage_key({"seed": 0, "step": "Cast"})
        True
    """
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def finished_key(question: dict[str, Any]) -> str:
    """The stage that holds the run.json of the run that was finished for these goals and recipe."""
    return stage_key({"finished": question})


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system refuses into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be used: {error.strerror or error}. Choose another --out, or make "
            "this one a folder that can be written."
        ) from error


def _refuse_foreign(folder: Path) -> None:
    names = os.listdir(folder) if folder.exists() else []
    others = sorted(name for name in names if name != LOCK and not is_temporary(name))
    if others and IDENTITY not in others:
        more = ", ..." if len(others) > 3 else ""
        raise UserError(
            f"{folder}: the output folder holds other files ({', '.join(others[:3])}{more}). "
            "Choose another --out, or an empty folder."
        )


def _locked(folder: Path) -> int:
    """The handle that holds the folder's lock as long as it is open, also past a crash."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise UserError(
            f"{folder}: another run (pid {holder}) is working in {folder}. Wait for it, or "
            "choose another --out."
        ) from error
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove_unfinished(folder: Path) -> None:
    for place in (folder, folder / STAGES):
        for name in os.listdir(place) if place.is_dir() else ():
            if is_temporary(name):
                (place / name).unlink()


def _line(text: str) -> bytes:
    data = text.encode()
    return b"%d %08x %s\n" % (len(data), zlib.crc32(data), data)


def _opened(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """The records, their size in bytes, and a handle at whose end the next one goes."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        data = path.read_bytes()
        records, size = _read(path, data)
        if size < len(data):
            os.ftruncate(handle, size)
            progress.say(f"{path}: its last record was torn and is cut off.")
        os.fsync(handle)
        sync_folder(path.parent)
    except BaseException:
        os.close(handle)
        raise
    return records, size, handle


def _read(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The good records and how far they reach; only the last one may be bad."""
    records: list[dict[str, Any]] = []
    size = 0
    lines = io.BytesIO(data).readlines()  # ends lines at \n alone
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None and number == len(lines):
            break
        if record is None:
            raise UserError(
                f"{path}: line {number} is damaged, and records follow it, so the disk or an "
                "editor changed the file. Restore it, choose another --out, or delete the folder."
            )
        records.append(record)
        size += len(line)
    return records, size


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line with its newline, None where it is not exactly what was written."""
    match = re.fullmatch(rb"(\d{1,12}) ([0-9a-f]{8}) (\{.*\})\n", line)
    if match is None:
        return None
    length, crc, text = int(match[1]), int(match[2], 16), match[3]
    if length != len(text) or crc != zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record.get("kind"), str) else None
