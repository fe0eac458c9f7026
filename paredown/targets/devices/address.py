"""Addresses of devices that are reached by ssh."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from paredown.core.errors import UserError

FORM = "ssh://user@host, ssh://user@host:2222 or ssh://user@host/?python=/opt/venv/bin/python"
PYTHON = "python3"  # on the device, where the address names none
NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%+-]*")  # never one that ssh would take for an option


@dataclass(frozen=True)
class Address:
    """Where ssh connects to, and the Python that runs there.

    Attributes:
        text: the address as it was given.
        user: "" leaves it to ssh's own settings.
        port: 0 leaves it to ssh's own settings.
        python: what starts Python on the device.
    """

    text: str
    host: str
    user: str = ""
    port: int = 0
    python: str = PYTHON

    @property
    def login(self) -> str:
        """The user and the host, as ssh is given them by hand."""
        port = f"-p {self.port} " if self.port else ""
        return f"{port}{self.user}@{self.host}" if self.user else f"{port}{self.host}"


def parsed(text: str) -> Address:
    """The parts of an address.

    Raises:
        UserError: it is no address of that form; says what is wrong with it.

    Example:
        >>> parsed("ssh://pi@berry:2222/?python=/opt/venv/bin/python").python
        '/opt/venv/bin/python'
        >>> parsed("ssh://berry").login
        'berry'
        >>> parsed("ssh://-oProxyCommand=x")
        Traceback (most recent call last):
            ...
        paredown.core.errors.UserError: device: 'ssh://-oProxyCommand=x': its host is no name of \
a host; write it as ssh://user@host, ssh://user@host:2222 or \
ssh://user@host/?python=/opt/venv/bin/python.
    """
    try:
        parts = urlsplit(text)
        host, user, port = parts.hostname or "", parts.username or "", parts.port or 0
        asked = parse_qs(parts.query, strict_parsing=bool(parts.query), max_num_fields=4)
    except ValueError as error:
        raise _wrong(text, str(error)) from error
    problem = _problem(parts.netloc, host, user, parts.path, parts.fragment)
    if parts.password is not None:
        problem = "holds a password, which is never given on a command line; use a key"
    if set(asked) - {"python"} or any(len(each) > 1 for each in asked.values()):
        problem = f"asks for {', '.join(asked)}; python alone may be asked for, once"
    if problem:
        raise _wrong(text, problem)
    return Address(text, host, user, port, asked.get("python", [PYTHON])[0])


def _problem(place: str, host: str, user: str, path: str, fragment: str) -> str:
    if not host:
        return "it names no host"
    if not NAME.fullmatch(host):
        return "its host is no name of a host"
    if "@" in place and not NAME.fullmatch(user):
        return "its user is no name of a user"
    if place.rpartition("@")[2].endswith(":") or place.endswith(":0"):
        return "its port is no number from 1 to 65535"
    return "something stands behind the host" if path not in ("", "/") or fragment else ""


def _wrong(text: str, problem: str) -> UserError:
    return UserError(f"device: {text!r}: {problem}; write it as {FORM}.")
