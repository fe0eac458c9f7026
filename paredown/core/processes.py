"""How a process ended, in words."""

from __future__ import annotations

import signal

FROM_OUTSIDE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
WITHOUT_MEMORY = {
    "SIGKILL": "was killed (SIGKILL), as the system does where the memory runs out",
    "SIGBUS": "crashed (SIGBUS), as where the shared memory or the disk runs out",
}


def ended(code: int | None) -> str:
    """What an exit code says, negative for a signal, as `subprocess` has it; None runs still.

    Example:
        >>> ended(3), ended(-6), ended(-15)
        ('ended with exit code 3', 'crashed (SIGABRT)', 'was ended from outside (SIGTERM)')
        >>> ended(-9)
        'was killed (SIGKILL), as the system does where the memory runs out'
    """
    if code is None:
        return "gave no answer"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    if name in FROM_OUTSIDE:
        return f"was ended from outside ({name})"
    return WITHOUT_MEMORY.get(name, f"crashed ({name})")
