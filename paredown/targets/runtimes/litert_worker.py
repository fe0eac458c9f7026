"""The process in which LiteRT's converter works, and in which lowered files are first run.

The converter takes seconds to load, so the process stays for the next model. It ends with its
parent; where the converter takes it down, the next model gets a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.graph.model import Model
from paredown.targets.devices import probe
from paredown.targets.runtimes import runtime

START = "from paredown.targets.runtimes import litert_worker; litert_worker.main()"


class Worker:
    """The parent's side: asks, and waits for the answer."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def convert(self, model: Model) -> bytes:
        """The model as the bytes of a .tflite file.

        Raises:
            UserError: LiteRT cannot take the model.
        """
        with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
            stored, made = Path(folder) / "model.safetensors", Path(folder) / "model.tflite"
            model.save(stored)
            self._ask("convert", model=str(stored), file=str(made))
            return made.read_bytes()

    def predictor(self, path: Path) -> _Remote:
        """A predictor over a file, run in the process."""
        return _Remote(self, path)

    def run(self, path: Path, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
            given, made = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
            np.savez(given, *arrays)
            self._ask("run", file=str(path.absolute()), inputs=str(given), outputs=str(made))
            return _arrays(made)

    def names(self, path: Path) -> list[str]:
        found: list[str] = self._ask("names", file=str(path.absolute()))["outputs"]
        return found

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if stream is not None:
                        stream.close()

    def _ask(self, command: str, **values: Any) -> dict[str, Any]:
        line = json.dumps({"command": command, **values}).encode() + b"\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None and child.stdout is not None
            try:
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(line)
                    child.stdin.flush()
                answer = child.stdout.readline()
            except BaseException:  # an interrupt must not leave an answer behind
                self.close()
                raise
            if not answer:
                raise UserError(f"model: LiteRT's converter {self._ending(child)}.")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            kind, _, text = found["error"].partition(": ")
            raise UserError(text if kind == "UserError" else f"model: LiteRT failed: {text}")
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-c", START],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"},
                start_new_session=True,
            )
        return self._child

    def _ending(self, child: subprocess.Popen[bytes]) -> str:
        self.close()
        code = child.returncode
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"


class _Remote:
    """Looks like the runtime's predictor."""

    def __init__(self, worker: Worker, path: Path) -> None:
        self._worker, self._path = worker, path
        self.output_names = worker.names(path)

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return self._worker.run(self._path, arrays)


@functools.cache
def worker() -> Worker:
    """The one process of this program."""
    made = Worker()
    atexit.register(made.close)
    return made


# --- the child's side ------------------------------------------------------------------------


def _convert(model: str, file: str) -> dict[str, Any]:
    from paredown.targets.formats.litert import write

    raw = write.encode(Model.load(model))
    Path(file).write_bytes(raw)
    return {}


def _names(file: str) -> dict[str, Any]:
    return {"outputs": runtime("litert").open(file).output_names}


def _run(file: str, inputs: str, outputs: str) -> dict[str, Any]:
    np.savez(outputs, *runtime("litert").open(file)(*_arrays(Path(inputs))))
    return {}


def _arrays(path: Path) -> tuple[np.ndarray, ...]:
    with np.load(path, allow_pickle=False) as stored:
        return tuple(stored[f"arr_{n}"] for n in range(len(stored.files)))


def main() -> None:
    requests, answers = probe.listen()
    commands: dict[str, Any] = {"convert": _convert, "run": _run, "names": _names}
    for request in requests:
        print(probe.answer(commands, request), file=answers, flush=True)
