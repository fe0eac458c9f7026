"""A device that is reached by ssh, ``ssh://user@host``; docs/devices.md says what it must have.

The probe, the runtime's own file and the exported file are copied there once for what they hold,
and the probe is asked over one ssh channel as a local one is asked over its pipes. A connection
that is lost is made again, and the request that was lost is repeated.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np

from paredown.core.errors import UserError
from paredown.core.processes import ended
from paredown.targets.artifact import companions
from paredown.targets.devices import forks, probe
from paredown.targets.devices.address import Address, parsed
from paredown.targets.devices.device import TIMEOUT_S, Device
from paredown.targets.devices.lines import Lines
from paredown.targets.devices.local import DOING
from paredown.targets.devices.lost import Lost
from paredown.targets.devices.shell import LOST, Shell, tail
from paredown.targets.devices.store import Store

_shells: dict[tuple[int, str], Shell] = {}  # this process, and an address


def connect(address: str) -> Device:
    """The device at ``ssh://user@host[:port][/?python=...]``; nothing is connected yet.

    Raises:
        UserError: it is no such address.
    """
    return cast(Device, functools.partial(Remote, parsed(address)))


class Remote:
    """An exported file, opened by its runtime on a device for as long as the block lasts.

    Args:
        address: where.
        file, runtime_file, threads, timeout_s: as `Device` has them.
        fresh: every process there is fresh.

    Raises:
        UserError: the device cannot be reached, lacks something, or is gone for good; or as
            `Device` has it.
    """

    def __init__(
        self,
        address: Address,
        file: Path,
        runtime_file: Path,
        threads: int = 1,
        timeout_s: float = TIMEOUT_S,
        fresh: bool = True,
    ) -> None:
        self.file, self.runtime_file = file, runtime_file
        self.threads, self.timeout_s = threads, timeout_s
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        self.conditions: dict[str, float] = {}
        self._address = address
        self._child: subprocess.Popen[bytes] | None = None
        self._ran: tuple[str, Path, dict[str, Any]] | None = None  # what the memory is the peak of

    def __enter__(self) -> Remote:
        if not self.file.exists():
            raise UserError(f"{self.file}: no such file.")
        self._shell = _shell(self._address)
        self._store = Store(self._shell, self.timeout_s)
        self._said = tempfile.TemporaryFile()
        try:
            self._shell.again(self._start)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def run(self, inputs: Path, outputs: Path) -> list[list[np.ndarray]]:
        """Run every batch of the npz file ``inputs``; the outputs pass through ``outputs``."""

        def work() -> None:
            self._started()
            self._work("run", inputs, {})
            self._store.fetch(f"{self._store.folder}/outputs.npz", outputs)

        self._shell.again(work)
        return list(probe.read_batches(str(outputs)))

    def time(self, inputs: Path, count: int, warmup: int = 0) -> tuple[np.ndarray, float | None]:
        """Latencies in ms (count,), cycling through the batches, and mJ per inference or None."""

        def work() -> dict[str, Any]:
            more = count if self._started() else 0  # a new process is cold
            return self._work("time", inputs, {"warmup": warmup + more, "count": count})

        answer = self._shell.again(work)
        self.conditions = answer["conditions"]
        return np.array(answer["latencies_ms"], dtype=np.float64), answer["energy_mj"]

    def memory(self) -> int | None:
        """Peak resident bytes since just before the file was opened; None where unknown."""

        def work() -> dict[str, Any]:
            if self._started() and self._ran is not None:
                self._work(*self._ran)  # a new process has run nothing yet
            return self._exchange("memory")

        peak: int | None = self._shell.again(work)["peak_bytes"]
        return peak

    def describe(self) -> dict[str, str]:
        """The device and what runs on it, as a local one."""

        def work() -> dict[str, Any]:
            self._started()
            return self._exchange("versions")

        found = self._shell.again(work)
        return {"device": self._address.text, **found, "threads": str(self.threads)}

    def _started(self) -> bool:
        """Have a process in which the file is open; whether it is a new one."""
        if self._child is not None:
            return False
        self._start()
        return True

    def _start(self) -> None:
        """Copy what is not there, start the probe, and open the file in it."""
        code, own = Path(probe.__file__), [self.file, *companions(self.file)]
        groups = [code], [self.runtime_file], own
        place, runtime, file = self._store.begin(self.runtime_file, groups)
        variables = [f"{name}={self.threads}" for name in forks.THREADS]
        python = "env", *variables, "PYTHONDONTWRITEBYTECODE=1", self._address.python
        started = shlex.join([*python, place])
        # the shell tells a signal by an exit code of its own, which ssh would tell as a lost one
        self._child = self._shell.channel(f"{started}; exit $?", self._said.fileno())
        assert self._child.stdout is not None
        self._lines = Lines(self._child.stdout)
        names = self._exchange("open", file=file, runtime_file=runtime, threads=self.threads)
        self.input_names, self.output_names = names["inputs"], names["outputs"]

    def _work(self, command: str, inputs: Path, values: dict[str, Any]) -> dict[str, Any]:
        self._ran = command, inputs, values
        there = {"inputs": self._store.inputs(inputs)}
        if command == "run":
            there["outputs"] = f"{self._store.folder}/outputs.npz"
        return self._exchange(command, **there, **values)

    def _exchange(self, command: str, **values: Any) -> dict[str, Any]:
        """The probe's answer.

        Raises:
            Lost: the connection ended.
        """
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told by the answer that does not come
            self._child.stdin.write(json.dumps({"command": command, **values}).encode() + b"\n")
            self._child.stdin.flush()
        try:
            line = self._lines.next(self.timeout_s)
        except TimeoutError:
            self._kill()
            raise UserError(
                f"{self._what}: {DOING[command]} took more than {self.timeout_s:g} s and was "
                "stopped."
            ) from None
        if line is None:
            raise self._ending(command)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self._what}: {DOING[command]} failed: {answer['error']}")
        return answer

    def _ending(self, command: str) -> Lost | UserError:
        """How the channel ended: with the connection, or with the process there."""
        assert self._child is not None
        code = LOST
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(5)
        self._kill()
        if code in (LOST, -signal.SIGKILL):
            return self._shell.lost(self._said.fileno())
        said = tail(self._said.fileno()).strip().splitlines()
        how = ended(128 - code if code > 128 else code)
        last = f": {said[-1][:300]}" if said else ""
        return UserError(f"{self._what}: {DOING[command]} {how}{last}.")

    @property
    def _what(self) -> str:
        return f"{self.file} on {self._address.text}"

    def _kill(self) -> None:
        """End the channel, with which the probe ends."""
        if self._child is None:
            return
        forks.kill(self._child)
        self._child = None

    def _end(self) -> None:
        self._kill()
        self._said.close()
        for _ in range(2):  # else a later run removes what is left
            with contextlib.suppress(Lost):
                with contextlib.suppress(UserError):
                    self._store.end()
                return


def _shell(address: Address) -> Shell:
    key = os.getpid(), address.text
    if key not in _shells:
        _shells[key] = Shell(address)
    return _shells[key]


@atexit.register
def end() -> None:
    """Close all connections; the next request makes a new one."""
    while _shells:
        (pid, _), shell = _shells.popitem()
        if pid == os.getpid():
            shell.end()
