"""Peak memory of a process that runs a file, and what it takes without the model.

It is that of a fresh process: a fork shares with its server what it began with. It stays the same
within 0.2 %, so each file is asked once.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paredown.core import cache
from paredown.core.task import Target
from paredown.graph.capture import capture
from paredown.measure import timing
from paredown.targets.artifact import digest, size_bytes
from paredown.targets.devices import probe
from paredown.targets.devices.device import TIMEOUT_S, write_batches
from paredown.targets.runtimes import ready

FLOOR_SAMPLES = 200  # of the latency of a model of one op, each of some microseconds

_known: dict[tuple[object, ...], int | None] = {}  # of this process
_floors: dict[tuple[object, ...], Floor] = {}


def peak_bytes(
    file: Path, target: Target, arrays: list[np.ndarray], timeout_s: float = TIMEOUT_S
) -> int | None:
    """Peak resident bytes of a fresh process that opens the file and runs it once; None where the
    system does not tell.

    Args:
        arrays: one per input of the file, as deployed.
        timeout_s: the longest that opening or running it may take, in seconds.

    Raises:
        UserError: the file cannot be opened or run.
    """
    shapes = tuple((array.dtype.str, array.shape) for array in arrays)
    key = digest(file), target.runtime, target.device, target.threads, shapes
    if key not in _known:
        with (
            tempfile.TemporaryDirectory(prefix="paredown-") as folder,
            timing.opened({"file": file}, target, timeout_s, fresh=True) as probes,
        ):
            write_batches(Path(folder) / "first.npz", [arrays])
            probes["file"].time(Path(folder) / "first.npz", 1)
            _known[key] = probes["file"].memory()
    return _known[key]


# What there is without the model


@dataclass(frozen=True)
class Floor:
    """What a model of one op takes on a target: nothing that is compressed takes less.

    Attributes:
        memory_bytes: peak of its process; None where the system does not tell.
        latency_ms: the least of its latencies.
        size_bytes: of its file.
        metered: whether the energy of an inference can be read.
    """

    memory_bytes: int | None
    latency_ms: float
    size_bytes: int
    metered: bool


class _OneOp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def floor(target: Target) -> Floor:
    """What a model of one op takes; found once for each machine, runtime and version of it."""
    where = target.runtime, target.device, target.threads
    if where not in _floors and target.device != "local":
        _floors[where] = _floor(target)  # another machine may be at that address next time
    if where not in _floors:
        key = machine(target) | {"runtime": target.runtime, "threads": target.threads}
        _floors[where] = cache.kept(
            "floors", key, lambda: dataclasses.asdict(_floor(target)), lambda found: Floor(**found)
        )
    return _floors[where]


def machine(target: Target) -> dict[str, Any]:
    """What a measurement on this machine depends on besides the file: the machine and versions."""
    packages = ("paredown", "numpy", *ready(target.runtime).PACKAGES)
    return {
        "device": target.device,
        "cpu": probe.cpu_model(),
        "cores": probe.usable_cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "node": platform.node(),
        "versions": {name: version(name) for name in packages},
    }


def _floor(target: Target) -> Floor:
    chosen, x = ready(target.runtime), torch.zeros(1, 1)
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        file = chosen.lower(capture(_OneOp(), (x,)), Path(folder) / f"one{chosen.SUFFIX}")
        inputs = Path(folder) / "inputs.npz"
        write_batches(inputs, [[x.numpy()]])
        with timing.opened({"one": file}, target) as probes:
            energy = probes["one"].time(inputs, 1)[1]
            peak = probes["one"].memory()
            latencies, _ = probes["one"].time(inputs, FLOOR_SAMPLES, FLOOR_SAMPLES)
            return Floor(peak, float(latencies.min()), size_bytes(file), energy is not None)
