"""A file is opened first in a process of its own: one that crashes its runtime ends that alone.

To start such a process takes from 0.3 s, with ONNX Runtime, to 2.5 s, with ExecuTorch, which
brings PyTorch along. So one is kept for each runtime, and takes a file after another.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from paredown.core.errors import UserError
from paredown.targets.devices.device import write_batches
from paredown.targets.devices.local import Probe

_kept: dict[tuple[int, Path], Probe] = {}  # this process, and a runtime's file


class Opened:
    """A predictor over a file that is open in another process."""

    def __init__(self, probe: Probe, folder: Path) -> None:
        self._probe, self._folder = probe, folder
        self.input_names, self.output_names = probe.input_names, probe.output_names

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        inputs = self._folder / "inputs.npz"
        write_batches(inputs, [arrays])
        return tuple(self._probe.run(inputs, self._folder / "outputs.npz")[0])


@contextlib.contextmanager
def opened(file: Path, runtime_file: str | Path) -> Iterator[Opened]:
    """The file, open for as long as the block lasts, on one thread.

    Args:
        runtime_file: the Python file of its runtime, with ``open(path, threads)``.

    Raises:
        UserError: the file cannot be opened or run, or its process crashed; names the file and
            what happened.
    """
    with (
        _process(file, runtime_file) as probe,
        tempfile.TemporaryDirectory(prefix="paredown-") as folder,
    ):
        yield Opened(probe, Path(folder))
        probe.close()


def optimise(file: Path, runtime_file: str | Path, made: Path) -> None:
    """Write the graph that the runtime makes of a file to ``made``.

    Args:
        runtime_file: the Python file of its runtime, with ``optimise(path, made)``.

    Raises:
        UserError: as `opened`.
    """
    with _process(file, runtime_file) as probe:
        probe.close()
        probe.optimise(made)


@contextlib.contextmanager
def _process(file: Path, runtime_file: str | Path) -> Iterator[Probe]:
    """The runtime's process, in which the file is open; it is kept, unless something failed."""
    key = os.getpid(), Path(runtime_file)
    probe = _kept.pop(key, None)  # another file meanwhile gets another process
    try:
        if probe is None:
            probe = Probe(file, key[1]).__enter__()
        else:
            probe.open(file)
        yield probe
    except BaseException as error:
        if probe is not None:
            probe.__exit__(type(error), error, error.__traceback__)
        raise
    _kept[key] = probe


@atexit.register
def _end() -> None:
    while _kept:
        (pid, _), probe = _kept.popitem()
        if pid == os.getpid():
            with contextlib.suppress(UserError, OSError):
                probe.__exit__(None, None, None)
