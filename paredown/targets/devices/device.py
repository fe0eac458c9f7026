"""Devices by the scheme of their address, and what each promises."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from paredown.core.errors import UserError
from paredown.core.named import named

if TYPE_CHECKING:
    import numpy as np

TIMEOUT_S = 600.0
DEVICES = {  # scheme -> what connects to an address, and gives a `Device`
    "local": "paredown.targets.devices.local:connect",
    "ssh": "paredown.targets.devices.ssh:connect",
}


class Opened(Protocol):
    """An exported file, opened by its runtime in a process of its own on the device.

    A batch is one array per input; files of batches are npz as `write_batches` makes them.

    Attributes:
        conditions: what else went on there while the file was timed last: ``seconds`` it took,
            ``cores`` there are, ``others``, the cores that other programs took, ``throttles`` of
            the processor, and its ``speed`` as a share of the highest; each as far as it is told.
    """

    file: Path
    input_names: list[str]
    output_names: list[str]
    conditions: dict[str, float]

    def run(self, inputs: Path, outputs: Path) -> list[list[np.ndarray]]:
        """The outputs of every batch in the file ``inputs``; they pass through ``outputs``."""

    def time(self, inputs: Path, count: int, warmup: int = 0) -> tuple[np.ndarray, float | None]:
        """Latencies in ms (count,), cycling through the batches, and mJ per inference or None."""

    def memory(self) -> int | None:
        """Peak resident bytes since just before the file was opened; None where unknown."""

    def describe(self) -> dict[str, str]:
        """The device and what runs on it: cpu, cores, os, python, runtime; and as far as it is
        told instruction sets, governor, memory, load and temperature."""


class Device(Protocol):
    """A machine that runs exported files, this one or another."""

    def __call__(
        self,
        file: Path,
        runtime_file: Path,
        threads: int = 1,
        timeout_s: float = TIMEOUT_S,
        fresh: bool = True,
    ) -> AbstractContextManager[Opened]:
        """The file, open in a process of its own for as long as the block lasts.

        Args:
            file: the exported file.
            runtime_file: the Python file of its runtime, with ``open(path, threads)``.
            threads: threads of one inference.
            timeout_s: the longest that one request may take, in seconds.
            fresh: in a process that has done nothing yet; else the process may be forked from one
                that has imported the runtime, which is quicker. Of such a one the memory tells
                less, since it shares what it began with.

        Raises:
            UserError: the file cannot be opened, or the process crashed, hung or answered with an
                error; names the file and what happened.
        """


def device(address: str) -> Device:
    """The device at an address, whose scheme, what stands before a colon, is one of `DEVICES`.

    Raises:
        UserError: no such device.
    """
    scheme = address.partition(":")[0]
    if scheme not in DEVICES:
        raise UserError(f"device: {address!r} is not one of {', '.join(DEVICES)}.")
    made: Device = named(DEVICES[scheme])(address)
    return made


def write_batches(path: Path, batches: Sequence[Sequence[np.ndarray]]) -> None:
    """Batches of arrays as the npz file that a probe reads."""
    import numpy as np

    arrays = {
        f"{batch}.{position}": array
        for batch, each in enumerate(batches)
        for position, array in enumerate(each)
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]
