"""Processes that are forked from one that has imported a runtime already.

Most of what it takes to open a file in a fresh process is to import the runtime: 0.1 s of ONNX
Runtime, a second and more of ExecuTorch, which brings PyTorch along. So one process of each runtime
imports it, opens nothing, and is forked for each file.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Protocol

from paredown.core.threads import as_deployed
from paredown.targets.devices import probe

STARTED_S = 60.0  # the longest that importing a runtime may take
EACH_S = 0.01  # between looks whether a fork has ended
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
NUMPYS = {"OPENBLAS_NUM_THREADS": "1"}  # whose threads would start with the import; no runtime's


class Child(Protocol):
    """A process with pipes, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...
    @property
    def returncode(self) -> int | None: ...
    @property
    def stdin(self) -> IO[bytes] | None: ...
    @property
    def stdout(self) -> IO[bytes] | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def kill(child: Child) -> None:
    """End a process and whatever it started, and close its pipes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.close()


class _Server:
    """One process that has imported a runtime, and is forked."""

    def __init__(self, runtime_file: Path, threads: int) -> None:
        self._channel, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", probe.__file__, str(runtime_file), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment(threads) | NUMPYS,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._channel.settimeout(STARTED_S)
        self.works = False  # until it says that it has imported the runtime
        with contextlib.suppress(OSError):
            self.works = self._channel.recv(2**12) == b"ready"

    def ask(self, command: str, streams: list[int], **values: Any) -> dict[str, Any]:
        """Its answer; an empty one where it has died."""
        request = json.dumps({"command": command, **values}).encode()
        try:
            with self._lock:
                if streams:
                    socket.send_fds(self._channel, [request], streams)
                else:
                    self._channel.sendall(request)
                answer: dict[str, Any] = json.loads(self._channel.recv(2**12) or b"{}")
        except OSError:
            answer = {}
        self.works = bool(answer)
        return answer

    def end(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


class Forked:
    """A fork, looked at as `subprocess.Popen` looks at a process."""

    def __init__(self, server: _Server, stderr: IO[bytes]) -> None:
        self._server = server
        self.returncode: int | None = None
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        try:
            self.pid: int = server.ask("fork", [theirs_in, theirs_out, stderr.fileno()])["pid"]
        except BaseException:
            os.close(ours_in)
            os.close(ours_out)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self.stdin: IO[bytes] | None = os.fdopen(ours_in, "wb")
        self.stdout: IO[bytes] | None = os.fdopen(ours_out, "rb")

    def wait(self, timeout: float | None = None) -> int:
        """How it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not.
        """
        until = time.monotonic() + (STARTED_S if timeout is None else timeout)
        while self.returncode is None:
            gone = {"code": -signal.SIGKILL}  # nobody is left who knows
            self.returncode = (self._server.ask("wait", [], pid=self.pid) or gone)["code"]
            if self.returncode is None:
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired("fork", timeout or STARTED_S)
                time.sleep(EACH_S)
        return self.returncode


_servers: dict[tuple[int, Path, int], _Server] = {}  # this process, a runtime's file, threads


def forked(runtime_file: Path, threads: int, stderr: IO[bytes]) -> Forked | None:
    """A process that has imported the runtime; None where the system or the runtime cannot.

    Args:
        threads: of one inference.
        stderr: where it writes what goes wrong.
    """
    if not (sys.platform == "linux" and hasattr(socket, "send_fds")):
        return None  # elsewhere libraries do not outlive a fork
    key = os.getpid(), runtime_file, threads
    if key not in _servers:
        _servers[key] = _Server(runtime_file, threads)
    server = _servers[key]
    if not server.works:
        return None
    try:
        return Forked(server, stderr)
    except KeyError:  # it has died
        return None


def environment(threads: int) -> dict[str, str]:
    """Of a process that runs a file on that many threads."""
    return {**as_deployed(os.environ), **dict.fromkeys(THREADS, str(threads))}


@atexit.register
def end() -> None:
    """End the processes that are forked from; the next fork is of a new one."""
    while _servers:
        (pid, _, _), server = _servers.popitem()
        if pid == os.getpid():
            server.end()
