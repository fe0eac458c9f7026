"""Runs on a device that is reached from another machine: keeps files there by content.

It is given to the device's Python on standard input, with a command and its values as JSON as
arguments; the answer is one line of JSON, ``{"error": text}`` for whatever goes wrong.

    begin   run, modules, files -> home, python, missing (modules), free_bytes, and lacking:
                                   folder/name, of folder/name -> SHA-256
    arrived files               -> wrong: folder/name -> SHA-256, of those that came as others
    end     run                 -> nothing; what was made for the run is gone

It imports nothing but the standard library, and runs from Python 3.9 on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PART = ".part"  # how the name of a file ends that is still on its way
KEPT, MOST_BYTES = 64, 2**31  # folders that are kept for another time, and their bytes at most
STALE_S = 86400.0  # after which what a run left is nobody's any more
OLDEST = (3, 9)


def home() -> Path:
    """Where everything lies on the device."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "paredown"


def begin(run: str, modules: list[str], files: dict[str, str]) -> dict[str, Any]:
    """Make the run's folder, make room, and look what is here."""
    (home() / "runs" / run).mkdir(parents=True, exist_ok=True)
    (home() / "files").mkdir(exist_ok=True)
    for each in (home() / "runs").iterdir():
        if each.name != run and time.time() - each.stat().st_mtime > STALE_S:
            shutil.rmtree(each, ignore_errors=True)
    wanted = lacking(files)
    prune(home() / "files", KEPT, MOST_BYTES)
    return {
        "home": str(home()),
        "python": list(sys.version_info[:3]),
        "missing": [name for name in modules if importlib.util.find_spec(name) is None],
        "free_bytes": shutil.disk_usage(home()).free,
        "lacking": wanted,
    }


def prune(folder: Path, most: int, most_bytes: int) -> None:
    """Remove the folders in it that were asked for least lately, above a count and a size."""
    count, total = 0, 0
    for each in sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime):
        count, total = count + 1, total + sum(file.stat().st_size for file in each.iterdir())
        if count > most or total > most_bytes:
            shutil.rmtree(each, ignore_errors=True)


def lacking(files: dict[str, str]) -> list[str]:
    """Which files are not here, or not whole; the folders of all are made."""
    found = []
    for name, digest in files.items():
        path = home() / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.utime(path.parent)
        if not path.is_file() or sha256(path) != digest:
            found.append(name)
    return found


def arrived(files: dict[str, str]) -> dict[str, Any]:
    """Give files their names where they came as they were sent, and remove others."""
    wrong = {}
    for name, digest in files.items():
        path = home() / "files" / name
        part = path.with_name(path.name + PART)
        found = sha256(part)
        if found == digest:
            os.replace(part, path)
        else:
            wrong[name] = found
            part.unlink()
    return {"wrong": wrong}


def end(run: str) -> dict[str, Any]:
    """Remove what was made for a run."""
    shutil.rmtree(home() / "runs" / run, ignore_errors=True)
    return {}


def sha256(path: Path) -> str:
    """The digest of what a file holds.

    Raises:
        OSError: it cannot be read.
    """
    made = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            made.update(part)
    return made.hexdigest()


def main() -> None:
    """Answer the one command of the arguments."""
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "begin": begin,
        "arrived": arrived,
        "end": end,
    }
    try:
        found = commands[sys.argv[1]](**json.loads(sys.argv[2]))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
