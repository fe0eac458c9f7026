"""Why a connection failed, in words, and whether another try may help."""

from __future__ import annotations

from dataclasses import dataclass

from paredown.targets.devices.address import Address


class Lost(Exception):
    """A connection that failed.

    Args:
        final: whether another try would fail the same way.
    """

    def __init__(self, why: str, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


@dataclass(frozen=True)
class _Cause:
    """What ssh says, in what words that is told, and whether it stays so."""

    says: tuple[str, ...]
    told: str
    final: bool


_CAUSES = (  # the first that fits
    _Cause(
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key for"),
        "its host key is not the known one: either the device was set up anew or it is another "
        "machine; where you know why, run ssh-keygen -R {known} and connect once by hand, "
        "ssh {login}",
        final=True,
    ),
    _Cause(
        ("Host key verification failed", "No matching host key", "No ED25519 host key is known"),
        "its host key is not known here; connect once by hand, ssh {login}, and accept it",
        final=True,
    ),
    _Cause(
        ("Permission denied (", "Too many authentication failures"),
        "it refuses the login; no password is asked for here, so a key of yours must stand in its "
        "authorized_keys (ssh-copy-id {login}) or in your ssh agent",
        final=True,
    ),
    _Cause(
        ("Could not resolve hostname", "Name or service not known"),
        "no such host is known; check its name, or give its IP address",
        final=True,
    ),
    _Cause(
        ("Bad configuration option", "bad configuration options", "Can't open user config file"),
        "ssh cannot read its configuration: {said}",
        final=True,
    ),
    _Cause(
        ("Connection refused",),
        "the host answers but refuses the connection: is sshd running there, on that port?",
        final=False,
    ),
    _Cause(
        ("timed out", "No route to host", "Network is unreachable", "Host is down"),
        "the host cannot be reached: is it on, and on this network?",
        final=False,
    ),
)


def cause(said: str, address: Address, answered: bool) -> Lost:
    """What ssh said, as `Lost`.

    Args:
        answered: whether the device has answered before.

    Example:
        >>> from paredown.targets.devices.address import parsed
        >>> gone = cause("ssh: connect to b: No route to host", parsed("ssh://b"), True)
        >>> gone.final, str(gone)
        (False, 'the host cannot be reached: is it on, and on this network?')
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:200] if lines else ""
    host = f"'[{address.host}]:{address.port}'" if address.port else address.host
    for each in _CAUSES:
        if any(words in said for words in each.says):
            told = each.told.format(login=address.login, known=host, said=last)
            return Lost(told, each.final)
    what = "the connection was lost" if answered else "the connection failed"
    return Lost(f"{what}: {last}" if last else what)
