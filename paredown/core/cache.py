"""What was found out once and holds for a while, in a folder of the user's.

``PAREDOWN_CACHE`` names the folder, by default ``paredown`` in the user's folder for caches;
``off`` keeps nothing and looks nothing up. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from paredown.core.errors import UserError
from paredown.core.files import write_atomically

Kept = TypeVar("Kept")
VARIABLE, OFF = "PAREDOWN_CACHE", "off"


def folder() -> Path | None:
    """Where it is kept; None where nothing is."""
    asked = os.environ.get(VARIABLE, "")
    if asked:
        return None if asked == OFF else Path(asked)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "paredown"
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "paredown"


def kept(
    kind: str,
    key: dict[str, Any],
    make: Callable[[], dict[str, Any]],
    read: Callable[[dict[str, Any]], Kept],
    last_s: float | None = None,
) -> Kept:
    """What ``read`` makes of what ``make`` gives, as JSON; or gave before, for the same key.

    Args:
        key: all that it depends on, as JSON.
        last_s: how long it holds, in seconds; None for ever.
    """
    text = json.dumps({"kind": kind, **key}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    place = folder()
    found = None if place is None else _read(place / name, last_s)
    if found is not None:
        with contextlib.suppress(TypeError, KeyError, ValueError):  # damaged, or of other code
            return read(found)
    made = make()
    if place is not None:
        _write(place / name, made)
    return read(made)


def _read(path: Path, last_s: float | None) -> dict[str, Any] | None:
    """What a file holds; None where it is not there, too old, or damaged."""
    try:
        if last_s is not None and abs(time.time() - path.stat().st_mtime) > last_s:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, made: dict[str, Any]) -> None:
    try:
        write_atomically(path, json.dumps(made).encode())
    except UserError:  # where it cannot be kept, it is found out again
        return
