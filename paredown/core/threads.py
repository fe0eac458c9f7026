"""How the threads of this program wait for each other, and how many have a core."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path

POLICY, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
# GNU's OpenMP, which PyTorch has on Linux, looks so often before it sleeps. On two quiet cores that
# costs 3 %, and never looking 6 % of a training and 30 % of a search for ranks; with one core taken
# it takes two thirds of the time that its own choice takes (benchmarks/README.md).
LOOKS = "1000"
LOOK_S = 0.1  # ten ticks of a core
_ours: list[str] = []  # what this program has set, which no process that is timed is to have


def sleep_at_barriers() -> None:
    """Let OpenMP's threads soon sleep where they wait, in place of spinning, unless the user has
    chosen.

    On a machine whose cores are taken by others, threads that spin take the time of those they
    wait for: a step can last ten times as long. It must be called before PyTorch is loaded.
    """
    if POLICY not in os.environ and SPINS not in os.environ:
        os.environ |= {POLICY: "PASSIVE", SPINS: LOOKS}  # the first for other makes of OpenMP
        _ours.extend((POLICY, SPINS))


def sleeps() -> bool:
    """Whether OpenMP's threads sleep where they wait, or the user has said how long they spin."""
    return os.environ.get(POLICY, "").upper() == "PASSIVE" or SPINS in os.environ


def free_cores() -> int:
    """How many cores this process may use and no other program does, within `LOOK_S`; 0 and up.

    Where the system does not tell, those that its load average leaves.
    """
    own = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    cores = len(own)
    try:
        before, began, used = _idle(own), time.monotonic(), time.process_time()
        time.sleep(LOOK_S)
        seconds = time.monotonic() - began
        idle = (_idle(own) - before) / os.sysconf("SC_CLK_TCK") + time.process_time() - used
        return max(0, min(cores, round(idle / seconds)))
    except (OSError, ValueError):
        return max(0, cores - round(os.getloadavg()[0]))


def _idle(cores: Collection[int]) -> int:
    """Ticks that these cores have been idle since the system began."""
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split() or [""]
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            ticks += int(fields[3]) + int(fields[4])  # idle, and waiting for a disk
    return ticks


def as_deployed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what this program has set for itself.

    Example:
        >>> as_deployed({"HOME": "/"})
        {'HOME': '/'}
    """
    return {name: value for name, value in environment.items() if name not in _ours}
