"""How the threads of this program wait for each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

POLICY = "OMP_WAIT_POLICY"
_ours: list[str] = []  # what this program has set, which no process that is timed is to have


def sleep_at_barriers() -> None:
    """Let OpenMP's threads sleep where they wait, in place of spinning, unless the user has chosen.

    On a machine whose cores are taken by others, threads that spin take the time of those they
    wait for: a step can last ten times as long. It must be called before PyTorch is loaded.
    """
    if POLICY not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ[POLICY] = "PASSIVE"
        _ours.append(POLICY)


def as_deployed(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what this program has set for itself.

    Example:
        >>> as_deployed({"HOME": "/"})
        {'HOME': '/'}
    """
    return {name: value for name, value in environment.items() if name not in _ours}
