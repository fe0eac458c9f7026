"""Runs one exported file in a process of its own, for a parent that asks over standard input.

Requests and answers are JSON, one per line; arrays travel as npz files whose keys are
``batch.position``. A request names its command; every failure is answered as ``{"error": text}``.

    open     file, runtime_file, threads       -> inputs, outputs (names)
    close                                      -> nothing; another file may be opened
    optimise file, runtime_file, made (paths)  -> nothing; what the runtime makes of it is at made
    run      inputs, outputs (npz paths)       -> batches
    time     inputs (npz path), warmup, count  -> latencies_ms, energy_mj per inference or null,
                                                  conditions: what else went on meanwhile
    memory                                     -> peak_bytes of this process or null
    versions                                   -> cpu, cores, os, python, runtime; and as far as
                                                  the system tells what it is like at the moment

Started with a runtime's file and the number of a socket, it imports what opening a file imports,
and forks a process like that for each request on the socket; `Server` is told more.

This file imports nothing but the standard library and numpy, and is started by its path, so that
a device needs no more and nothing else counts in the memory that is measured.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import platform
import queue
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter_ns, process_time, sleep
from typing import Any, TextIO

import numpy as np

POWERCAP = Path("/sys/class/powercap")
CPUS, THERMAL = Path("/sys/devices/system/cpu"), Path("/sys/class/thermal")
INSTRUCTION_SETS = (  # as Linux names them, on x86 and on ARM
    *("sse4_2", "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
MAX_ERROR = 2000  # characters
PAGE, SHIFT_PAGES = 4096, 2**16  # by which a fork's addresses are moved at most


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

    def optimise(self, file: str, runtime_file: str, made: str) -> dict[str, Any]:
        load(runtime_file).optimise(Path(file), Path(made))
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
        began = moment()
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
            "conditions": conditions(began, moment()),
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
            **momentary(),
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
    lines = text_of(Path("/proc/self/status")).splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
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
    for line in text_of(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def affinity() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def usable_cores() -> int:
    return len(affinity())


def instruction_sets() -> str:
    """Those that kernels for neural nets are written for, as the system names them."""
    for line in text_of(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return " ".join(name for name in INSTRUCTION_SETS if name in value.split())
    return ""


def momentary() -> dict[str, str]:
    """What the machine has and does, as far as the system tells."""
    hottest = max((number_of(each) or 0 for each in THERMAL.glob("thermal_zone*/temp")), default=0)
    found = {
        "instruction sets": instruction_sets(),
        "governor": text_of(CPUS / "cpu0/cpufreq/scaling_governor").strip(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "load": f"{os.getloadavg()[0]:.2f}",
        "temperature": f"{hottest / 1000:.0f} degrees C" if hottest else "",
    }
    return {name: value for name, value in found.items() if value}


def moment() -> dict[str, Any]:
    """Clocks and counters, for `conditions` to compare two of them."""
    counts = [number_of(path) for path in CPUS.glob("cpu*/thermal_throttle/core_throttle_count")]
    speeds = [number_of(path) for path in CPUS.glob("cpu*/cpufreq/scaling_cur_freq")]
    return {
        "ns": perf_counter_ns(),
        "own_s": process_time(),
        "ticks": busy_ticks(),
        "throttles": sum(each or 0 for each in counts),
        "khz": sum(each or 0 for each in speeds) / len(speeds) if speeds else None,
    }


def busy_ticks() -> int | None:
    """Ticks in which the cores that this process may use did something; None where untold."""
    own = {f"cpu{number}" for number in affinity()}
    rows = [line.split() for line in text_of(Path("/proc/stat")).splitlines()]
    fields = [list(map(int, row[1:9])) for row in rows if row and row[0] in own]
    return sum(sum(each) - each[3] - each[4] for each in fields) if fields else None


def conditions(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What went on between two moments besides this process: the cores that others took, how often
    the processor was throttled, and its speed as a share of the highest."""
    seconds = max(1e-9, (after["ns"] - before["ns"]) / 1e9)
    found = {"seconds": seconds, "cores": float(usable_cores())}
    found["throttles"] = float(after["throttles"] - before["throttles"])
    if before["ticks"] is not None:
        busy_s = (after["ticks"] - before["ticks"]) / os.sysconf("SC_CLK_TCK")
        found["others"] = max(0.0, busy_s - (after["own_s"] - before["own_s"])) / seconds
    highest = number_of(CPUS / "cpu0/cpufreq/cpuinfo_max_freq")
    if after["khz"] and highest:
        found["speed"] = after["khz"] / highest
    return found


def text_of(path: Path) -> str:
    """What a file of the system holds; "" where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def number_of(path: Path) -> float | None:
    with contextlib.suppress(ValueError):
        return float(text_of(path))
    return None


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


class Server:
    """Forks processes that have imported a runtime already.

    Requests and answers are JSON too, one a message, over a socket:

        fork  (with the descriptors of three streams)  -> pid
        wait  pid                                      -> code, null while it runs

    A fork has only the thread that forks: the locks that another holds would stay locked. So no
    pool of threads may have been started, and it is forked while all other threads sleep.
    """

    def __init__(self, runtime_file: str, channel: socket.socket) -> None:
        self.channel = channel
        for name in load(runtime_file).IMPORTS:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()  # else a fork's collections would write on, and so copy, what it shares

    def serve(self) -> None:
        """Answer until the other end is closed; returns in each fork, to be a session."""
        self.channel.sendall(b"ready")
        while True:
            message, streams, _, _ = socket.recv_fds(self.channel, 2**12, 3)
            if not message:
                os._exit(0)
            request = json.loads(message)
            if request["command"] == "fork":
                answer: dict[str, Any] = {"pid": self.fork(streams)}
                if not answer["pid"]:
                    return
            else:
                answer = {"code": ended(request["pid"])}
            self.channel.sendall(json.dumps(answer).encode())

    def fork(self, streams: list[int]) -> int:
        while any(state != "S" for state in other_threads()):
            sleep(0.001)
        pid = os.fork()
        if not pid:
            os.setsid()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            self.channel.close()
            move_addresses()
        for stream in streams:
            os.close(stream)
        return pid


def other_threads() -> Iterator[str]:
    """The state of each thread of this process but the one that asks; none where it is not told."""
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            if int(task.name) != threading.get_native_id():
                yield (task / "stat").read_text().rpartition(")")[2].split()[0]


def move_addresses() -> None:
    """Place what comes at other addresses than the last fork did, as a fresh process would: a
    program's speed depends on them, so forks that share them would all err in the same way."""
    apart = random.Random(os.getpid() ^ perf_counter_ns())
    kept.append(mmap.mmap(-1, PAGE * apart.randrange(1, SHIFT_PAGES)))  # addresses, not memory
    kept.extend(bytearray(apart.randrange(16, PAGE)) for _ in range(apart.randrange(256)))


kept: list[Any] = []  # never given back


def ended(pid: int) -> int | None:
    """How a fork has ended, as subprocess tells it; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    if sys.argv[1:]:
        runtime_file, channel = sys.argv[1:]
        Server(runtime_file, socket.socket(fileno=int(channel))).serve()
    requests, answers = listen()
    session = Session()
    commands = {
        name: getattr(session, name)
        for name in ("open", "close", "optimise", "run", "time", "memory", "versions")
    }
    for request in requests:
        print(answer(commands, request), file=answers, flush=True)


if __name__ == "__main__":
    main()
