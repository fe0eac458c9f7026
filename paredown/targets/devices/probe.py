"""Runs one exported file in a process of its own, for a parent that asks over standard input.

Requests and answers are JSON, one per line; arrays travel as npz files whose keys are
``batch.position``. A request names its command; every failure is answered as ``{"error": text}``.

    open     file, runtime_file, threads       -> inputs, outputs (names)
    close                                      -> nothing; another file may be opened
    run      inputs, outputs (npz paths)       -> batches
    time     inputs (npz path), warmup, count  -> latencies_ms, energy_mj per inference or null
    memory                                     -> peak_bytes of this process or null
    versions                                   -> cpu, cores, os, python, runtime

This file imports nothing but the standard library and numpy, and is started by its path, so that
a device needs no more and nothing else counts in the memory that is measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import platform
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any, TextIO

import numpy as np

POWERCAP = Path("/sys/class/powercap")
MAX_ERROR = 2000  # characters


class Session:
    """The opened file and the inputs it is timed on."""

    def __init__(self) -> None:
        self.predictor: Any = None
        self.runtime: Any = None
        self.timed_on = ""
        self.cycle: Iterator[list[np.ndarray]] = iter(())

    def open(self, file: str, runtime_file: str, threads: int) -> dict[str, Any]:
        self.predictor, self.timed_on = None, ""
        self.runtime = load(runtime_file)
        reset_peak()
        try:
            self.predictor = self.runtime.open(Path(file), threads)
        except ModuleNotFoundError as error:
            extra = f"pip install 'paredown[{Path(runtime_file).stem}]'"
            raise RuntimeError(f"{error.name} is not installed there; run {extra}") from error
        return {
            "inputs": list(self.predictor.input_names),
            "outputs": list(self.predictor.output_names),
        }

    def close(self) -> dict[str, Any]:
        self.predictor = None
        return {}

    def run(self, inputs: str, outputs: str) -> dict[str, Any]:
        answers, count = {}, 0
        for count, arrays in enumerate(read_batches(inputs), 1):
            for position, array in enumerate(self.predictor(*arrays)):
                answers[f"{count - 1}.{position}"] = plain(array, position)
        np.savez(outputs, **answers)  # type: ignore[arg-type]
        return {"batches": count}

    def time(self, inputs: str, warmup: int, count: int) -> dict[str, Any]:
        if self.timed_on != inputs:
            self.timed_on, self.cycle = inputs, itertools.cycle(list(read_batches(inputs)))
        for arrays in itertools.islice(self.cycle, warmup):
            self.predictor(*arrays)
        before = read_energy_uj()
        latencies_ns = []
        for arrays in itertools.islice(self.cycle, count):
            start = perf_counter_ns()
            self.predictor(*arrays)
            latencies_ns.append(perf_counter_ns() - start)
        spent_uj = energy_between(before, read_energy_uj())
        return {
            "latencies_ms": [latency / 1e6 for latency in latencies_ns],
            "energy_mj": None if spent_uj is None else spent_uj / 1e3 / count,
        }

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": peak_bytes()}

    def versions(self) -> dict[str, Any]:
        return {
            "cpu": cpu_model(),
            "cores": str(usable_cores()),
            "os": platform.platform(),
            "python": platform.python_version(),
            "runtime": self.runtime.version(),
        }


def load(runtime_file: str) -> Any:
    """The module in a file, apart from any package; dataclasses in it need it in sys.modules."""
    name = f"runtime_{Path(runtime_file).stem}"  # not that of the package it wraps
    spec = importlib.util.spec_from_file_location(name, runtime_file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{runtime_file} is not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_batches(path: str) -> Iterator[list[np.ndarray]]:
    """The batches of an npz file, one in memory at a time: a list of arrays each."""
    with np.load(path, allow_pickle=False) as stored:
        for batch in itertools.count():
            names = itertools.takewhile(
                stored.files.__contains__, (f"{batch}.{position}" for position in itertools.count())
            )
            arrays = [stored[name] for name in names]
            if not arrays:
                return
            yield arrays


def plain(value: Any, position: int) -> np.ndarray:
    """An output as an array that npz can hold without pickling.

    Raises:
        ValueError: it is no tensor of numbers.
    """
    array: np.ndarray = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"output {position} holds {array.dtype}, not numbers")
    return array


def reset_peak() -> None:
    """Let the peak of the resident memory start anew, where the system can."""
    # where it cannot, the peak includes starting Python, which is below what a runtime takes
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def read_energy_uj(root: Path = POWERCAP) -> dict[str, tuple[int, int]]:
    """Package name -> (counter, where it wraps), both in microjoules; empty where unreadable.

    Only packages: cores and memory are parts of them, the platform domain contains them, and the
    same package may be offered twice, by registers and by memory mapping.
    """
    found = {}
    for folder in sorted(root.glob("intel-rapl*:*")):
        try:
            name = (folder / "name").read_text().strip()
            if name.startswith("package") and name not in found:
                counter = int((folder / "energy_uj").read_text())
                found[name] = (counter, int((folder / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            continue
    return found


def energy_between(
    before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
) -> float | None:
    """Microjoules between two readings, summed over the packages; None without a reading."""
    if not before or before.keys() != after.keys():
        return None
    return float(sum((after[name][0] - start) % (top + 1) for name, (start, top) in before.items()))


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def listen() -> tuple[Iterator[dict[str, Any]], TextIO]:
    """Requests and the stream for answers; what the runtime prints goes to standard error.

    A thread reads the requests, so that this process ends with its parent even amid an inference.
    """
    lines = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return iter(requests.get, None), answers


def answer(commands: dict[str, Callable[..., dict[str, Any]]], request: dict[str, Any]) -> str:
    """The answer to a request as one line; whatever goes wrong is told in it."""
    try:
        result = commands[request.pop("command")](**request)
    except (Exception, SystemExit) as error:
        text = str(error).strip()
        result = {"error": f"{type(error).__name__}: {text}"[:MAX_ERROR]}
    return json.dumps(result)


def main() -> None:
    requests, answers = listen()
    session = Session()
    commands = {
        name: getattr(session, name)
        for name in ("open", "close", "run", "time", "memory", "versions")
    }
    for request in requests:
        print(answer(commands, request), file=answers, flush=True)


if __name__ == "__main__":
    main()
