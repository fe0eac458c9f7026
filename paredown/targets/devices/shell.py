"""A shell on another machine, by OpenSSH's own client.

So the user's configuration, keys, agent and known hosts hold here as they do by hand. One
connection carries all commands (``ControlMaster``); it ends when it has been idle for a while.
``PAREDOWN_SSH_CONFIG`` names another configuration file, as ``ssh -F`` does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.threads import as_deployed
from paredown.targets.devices.address import Address
from paredown.targets.devices.lost import Lost, cause

Result = TypeVar("Result")
CONFIG = "PAREDOWN_SSH_CONFIG"
CONNECT_S, IDLE_S = 10, 120  # a connection takes at most, and lasts without a command
ALIVE_S, ALIVE_COUNT = 5, 3  # a machine that does not answer so often is gone
FIRST_PAUSES_S = (1.0,)  # before the next try, where the device has never answered
PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # and where it has
LONGEST_SOCKET = 70  # characters of the path of a socket's folder; the system allows about 100
LOST = 255  # what ssh ends with where the connection failed, and no command does


@dataclass(frozen=True)
class Ran:
    """What a command on the device came to."""

    code: int
    out: bytes
    said: str  # on standard error


class Shell:
    """Runs commands at an address; nothing is connected before the first.

    Raises:
        UserError: ssh is not installed here.
    """

    def __init__(self, address: Address) -> None:
        if shutil.which("ssh") is None:
            raise UserError(
                f"device: {address.text!r}: needs OpenSSH's client, not installed here; run "
                "apt-get install openssh-client."
            )
        self.address = address
        self._folder = tempfile.mkdtemp(prefix="paredown-ssh-", dir=_short_folder())
        self._answered = False

    def run(
        self,
        command: str,
        timeout_s: float,
        given: Path | bytes = b"",
        into: Path | None = None,
    ) -> Ran:
        """Run a command to its end.

        Args:
            given: its standard input.
            into: the file that takes its standard output, else it is in the result.

        Raises:
            Lost: the connection failed, or the command took longer.
        """
        with contextlib.ExitStack() as stack:
            source: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            if isinstance(given, Path):
                source = stack.enter_context(given.open("rb"))
            else:
                source.write(given)
                source.seek(0)
            made: IO[bytes] = stack.enter_context(tempfile.TemporaryFile())
            if into is not None:
                made = stack.enter_context(into.open("w+b"))
            said = stack.enter_context(tempfile.TemporaryFile())  # a pipe, the master would hold
            child = subprocess.Popen(
                self._line(command),
                stdin=source,
                stdout=made,
                stderr=said,
                env=_environment(),
                start_new_session=True,
            )
            try:
                code = child.wait(timeout_s)
            except BaseException as error:
                child.kill()
                child.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise Lost(f"a command took more than {timeout_s:g} s", final=True) from None
                raise
            words = tail(said.fileno())
            if code == LOST:
                raise self._lost(words)
            self._answered = True
            made.seek(0)
            return Ran(code, b"" if into else made.read(), words)

    def channel(self, command: str, said: int) -> subprocess.Popen[bytes]:
        """A command that goes on, by its pipes; what it says goes to the descriptor ``said``."""
        return subprocess.Popen(
            self._line(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=_environment(),
            start_new_session=True,
        )

    def again(self, work: Callable[[], Result]) -> Result:
        """What the work gives, done again while the connection is lost, after longer and longer.

        Raises:
            UserError: it is lost for good.
        """
        tries = 0
        while True:
            try:
                return work()
            except Lost as lost:
                pauses = PAUSES_S if self._answered else FIRST_PAUSES_S
                if lost.final or tries >= len(pauses):
                    tried = f" (tried {tries + 1} times)" if tries else ""
                    raise UserError(f"device: {self.address.text!r}: {lost}{tried}.") from None
                progress.say(f"  {self.address.text}: {lost}; again in {pauses[tries]:g} s")
                time.sleep(pauses[tries])
                tries += 1

    def end(self) -> None:
        """Close the connection."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["ssh", *self._options(), "-O", "exit", "--", self.address.host]
            subprocess.run(command, capture_output=True, timeout=5, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _lost(self, words: str) -> Lost:
        return cause(words, self.address, self._answered)

    def lost(self, said: int) -> Lost:
        """Why a channel has ended, by what it said to a descriptor."""
        return self._lost(tail(said))

    def _line(self, command: str) -> list[str]:
        return ["ssh", *self._options(), "--", self.address.host, command]

    def _options(self) -> list[str]:
        chosen = {
            "BatchMode": "yes",  # nobody is there to be asked
            "ConnectTimeout": str(CONNECT_S),
            "ConnectionAttempts": "1",
            "ControlMaster": "auto",
            "ControlPath": f"{self._folder}/%C",
            "ControlPersist": str(IDLE_S),
            "ServerAliveInterval": str(ALIVE_S),
            "ServerAliveCountMax": str(ALIVE_COUNT),
            "ClearAllForwardings": "yes",
            "RequestTTY": "no",
            "EscapeChar": "none",
            "LogLevel": "ERROR",
        }
        made = [word for name, value in chosen.items() for word in ("-o", f"{name}={value}")]
        config = os.environ.get(CONFIG)
        made += ["-F", config] if config else []
        made += ["-l", self.address.user] if self.address.user else []
        return made + (["-p", str(self.address.port)] if self.address.port else [])


def tail(descriptor: int, most: int = 4000) -> str:
    """The end of what a file holds that is still being written."""
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, most, max(0, size - most)).decode(errors="replace")


def _environment() -> dict[str, str]:
    """Ours, but for the language that the system's errors are told in."""
    return {**as_deployed(os.environ), "LC_ALL": "C"}


def _short_folder() -> str | None:
    return None if len(tempfile.gettempdir()) < LONGEST_SOCKET else "/tmp"
