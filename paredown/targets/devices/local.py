"""This machine as a device: one child process for each file that is measured."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.core.processes import ended
from paredown.targets.devices import forks, probe
from paredown.targets.devices.device import TIMEOUT_S, Device
from paredown.targets.devices.lines import Lines

MAX_FILE = 2**34  # bytes that a child may write into one file


def connect(address: str) -> Device:
    """This machine, whose address is ``local``.

    Raises:
        UserError: something stands behind that.
    """
    if address != "local":
        raise UserError(f"device: {address!r}: this machine is 'local', and nothing else.")
    return Probe


@dataclass(frozen=True)
class Under:
    """What a process runs under: a program before it, such as an emulator, and variables."""

    launcher: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


class Probe:
    """An exported file, opened by its runtime in a fresh process for as long as the block lasts.

    Args:
        file: the exported file.
        runtime_file: the Python file of the runtime, with ``open(path, threads)``.
        threads: threads of one inference.
        timeout_s: the longest that one request may take, in seconds.
        fresh: as `Device` has it.
        memory_bytes: the most memory the process may allocate; by default all there is.
        under: what it runs under; then the process is always fresh.

    Raises:
        UserError: the file cannot be opened, or the process crashed, hung or answered with an
            error; names the file and what happened.
    """

    def __init__(
        self,
        file: Path,
        runtime_file: Path,
        threads: int = 1,
        timeout_s: float = TIMEOUT_S,
        fresh: bool = True,
        memory_bytes: int | None = None,
        under: Under | None = None,
    ) -> None:
        self.file = file
        self.runtime_file = runtime_file
        self.threads = threads
        self.timeout_s = timeout_s
        self.fresh = fresh
        self.memory_bytes = memory_bytes or physical_memory()
        self.under = under
        self.input_names: list[str] = []
        self.output_names: list[str] = []
        self.conditions: dict[str, float] = {}

    def __enter__(self) -> Probe:
        if not self.file.exists():
            raise UserError(f"{self.file}: no such file.")
        self._stderr = tempfile.TemporaryFile()
        self._child = self._started()
        assert self._child.stdout is not None
        self._lines = Lines(self._child.stdout)
        try:
            limit(self._child.pid, self.memory_bytes)
            self.open(self.file)
        except BaseException:
            self._kill()
            raise
        return self

    def _started(self) -> forks.Child:
        if not self.fresh and self.under is None:
            forked = forks.forked(self.runtime_file.absolute(), self.threads, self._stderr)
            if forked is not None:
                return forked
        under = self.under or Under()
        return subprocess.Popen(
            [*under.launcher, sys.executable, "-I", probe.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=forks.environment(self.threads) | dict(under.variables),
            start_new_session=True,
        )

    def open(self, file: Path) -> None:
        """Open a file in this process, in place of the one before."""
        self.file = file
        names = self._ask(
            "open",
            file=str(file.absolute()),
            runtime_file=str(self.runtime_file.absolute()),
            threads=self.threads,
        )
        self.input_names, self.output_names = names["inputs"], names["outputs"]

    def optimise(self, made: Path) -> None:
        """Write the graph that the runtime makes of the file to ``made``."""
        self._ask(
            "optimise",
            file=str(self.file.absolute()),
            runtime_file=str(self.runtime_file.absolute()),
            made=str(made.absolute()),
        )

    def close(self) -> None:
        """Let go of the file; the process stays, and may open another."""
        self._ask("close")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kill()

    @property
    def pid(self) -> int:
        return self._child.pid

    def run(self, inputs: Path, outputs: Path) -> list[list[np.ndarray]]:
        """Run every batch of the npz file ``inputs``; the outputs pass through ``outputs``."""
        self._ask("run", inputs=str(inputs.absolute()), outputs=str(outputs.absolute()))
        return list(probe.read_batches(str(outputs)))

    def time(self, inputs: Path, count: int, warmup: int = 0) -> tuple[np.ndarray, float | None]:
        """Latencies in ms (count,), cycling through the batches, and mJ per inference or None."""
        answer = self._ask("time", inputs=str(inputs.absolute()), warmup=warmup, count=count)
        self.conditions = answer["conditions"]
        return np.array(answer["latencies_ms"], dtype=np.float64), answer["energy_mj"]

    def memory(self) -> int | None:
        """Peak resident bytes since just before the file was opened; None where unknown."""
        peak: int | None = self._ask("memory")["peak_bytes"]
        return peak

    def describe(self) -> dict[str, str]:
        """The device and what runs on it: cpu, cores, os, python, runtime."""
        return {"device": "local", **self._ask("versions"), "threads": str(self.threads)}

    def _ask(self, command: str, **values: Any) -> dict[str, Any]:
        line = json.dumps({"command": command, **values}).encode() + b"\n"
        assert self._child.stdin is not None
        if self._stderr.closed:
            raise UserError(f"{self.file}: its process has ended; open it again.")
        with contextlib.suppress(BrokenPipeError):  # told by the answer that does not come
            self._child.stdin.write(line)
            self._child.stdin.flush()
        answer: dict[str, Any] = json.loads(self._line(command))
        if "error" in answer:
            raise UserError(f"{self.file}: {DOING[command]} failed: {answer['error']}")
        return answer

    def _line(self, command: str) -> bytes:
        """The next line of the child's standard output."""
        try:
            line = self._lines.next(self.timeout_s)
        except TimeoutError:
            self._kill()
            raise UserError(
                f"{self.file}: {DOING[command]} took more than {self.timeout_s:g} s "
                "and was stopped."
            ) from None
        if line is None:
            raise UserError(f"{self.file}: {DOING[command]} {self._ending()}.")
        return line

    def _ending(self) -> str:
        """How the child ended, and its last words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(5)
        code, said = self._child.returncode, self._last_words()
        self._kill()
        how = ended(code)
        return f"{how}: {said}" if said else how

    def _last_words(self) -> str:
        size = os.fstat(self._stderr.fileno()).st_size
        text = os.pread(self._stderr.fileno(), 2000, max(0, size - 2000)).decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def _kill(self) -> None:
        """End the child and whatever it started."""
        if self._stderr.closed:
            return
        forks.kill(self._child)
        self._stderr.close()


DOING = {
    "open": "opening it",
    "close": "closing it",
    "optimise": "optimising it",
    "run": "running it",
    "time": "timing it",
    "memory": "reading its memory",
    "versions": "reading the device",
}


def limit(pid: int, memory_bytes: int) -> None:
    """Bound a child's memory and files, and let it leave no core; where the system can."""
    import resource

    if not hasattr(resource, "prlimit"):
        return
    bounds = ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_FSIZE, MAX_FILE))
    with contextlib.suppress(ProcessLookupError, PermissionError, ValueError):
        for kind, most in (*bounds, (resource.RLIMIT_CORE, 0)):
            hard = resource.prlimit(pid, kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.prlimit(pid, kind, (most, most))


def physical_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
