"""A worker's process as its parent has it: started, asked, ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.processes import ended
from paredown.ship.serve import worker
from paredown.targets.devices import forks, local

LAST_WORDS = 2000  # bytes of what a worker writes to its standard error that are kept
END_S = 5.0  # the longest that the system may take to end a killed process


class Died(Exception):
    """The process has ended, or was ended for it hung; says how."""


@dataclass(frozen=True)
class Opening:
    """What a worker opens.

    Attributes:
        file: the artifact.
        runtime_file: the Python file of its runtime.
        threads: of one inference.
        memory_bytes: the most that the process may allocate.
        maker: a Python file whose ``Model`` takes the place of the worker's own; "" for none.
        beside: what that one is given too.
    """

    file: Path
    runtime_file: Path
    threads: int = 1
    memory_bytes: int = field(default_factory=local.physical_memory)
    maker: str = ""
    beside: dict[str, Any] = field(default_factory=dict)


class Child:
    """One process and the socket to it. Made by `started`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._said = b""
        self._listening = asyncio.create_task(self._listen())

    @staticmethod
    async def started(opening: Opening) -> Child:
        """A process that has nothing open yet."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", worker.__file__, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=forks.environment(opening.threads),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        local.limit(process.pid, opening.memory_bytes)
        reader, writer = await asyncio.open_connection(sock=ours)
        return Child(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def open(self, opening: Opening) -> dict[str, Any]:
        """Open the file and warm it up; returns its signature.

        Raises:
            Died: the process ended, or the file cannot be opened.
        """
        answer, _ = await self.ask(
            {
                "command": "open",
                "file": str(opening.file.absolute()),
                "runtime_file": str(opening.runtime_file.absolute()),
                "threads": opening.threads,
                "maker": opening.maker,
                "paths": [str(Path(__file__).parents[3])],
                **opening.beside,
            }
        )
        if "error" in answer:
            raise Died(f"cannot open it: {answer['error']}")
        signature: dict[str, Any] = answer["signature"]
        return signature

    async def ask(
        self, said: dict[str, Any], arrays: Sequence[np.ndarray] = ()
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Send a message and wait for its answer.

        Raises:
            Died: the process has ended.
        """
        try:
            for part in worker.message(said, arrays):
                self._writer.write(part)
            await self._writer.drain()
            sizes = worker.SIZES.unpack(await self._reader.readexactly(worker.SIZES.size))
            head = json.loads(await self._reader.readexactly(sizes[0]))
            body = await self._reader.readexactly(sizes[1]) if sizes[1] else b""
        except (asyncio.IncompleteReadError, OSError) as error:
            raise Died(await self._ending()) from error
        return head, worker.arrays_of(head["arrays"], memoryview(body))

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        while part := await self._process.stderr.read(2**12):
            self._said = (self._said + part)[-LAST_WORDS:]

    async def _ending(self) -> str:
        """How the process ended, and its last words."""
        await self.end()
        lines = [line.strip() for line in self._said.decode(errors="replace").splitlines()]
        last = next((line[:300] for line in reversed(lines) if line), "")
        how = ended(self._process.returncode)
        return f"{how}: {last}" if last else how

    async def end(self) -> None:
        """Kill the process, where it has not ended by itself."""
        self._writer.close()
        with contextlib.suppress(asyncio.TimeoutError):  # a moment to end by itself
            await asyncio.wait_for(self._process.wait(), 0.05)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.wait(), END_S)
        with contextlib.suppress(asyncio.TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._listening, 0.5)
