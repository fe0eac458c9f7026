"""Opens one model in a process of its own, and runs the batches that come over a socket.

A message is the length of its head and of its arrays (two numbers of 8 bytes), the head as JSON,
and the arrays' bytes, one after the other as the head's ``arrays`` (dtype and shape each) tells.
What is asked is ``open`` first, then ``run`` as often as wanted; every failure that leaves the
process alive is answered as ``{"error": text}``.

This file imports nothing but the standard library and NumPy, and is started by its path, so that
a worker holds its runtime and nothing else.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIZES = struct.Struct("<QQ")
LONGEST_ERROR = 2000  # characters
DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
OTHER = 3  # how many examples the second run of the warm-up has


def message(said: dict[str, Any], arrays: Sequence[np.ndarray]) -> list[bytes | memoryview]:
    """A message in parts that follow each other.

    Example:
        >>> len(message({}, [np.zeros(2)])[1])
        16
    """
    bodies = [_body(array) for array in arrays]
    sizes = [len(body) for body in bodies]
    told = [
        ["texts" if array.dtype == object else array.dtype.str, array.shape, size]
        for array, size in zip(arrays, sizes, strict=True)
    ]
    text = json.dumps({**said, "arrays": told}).encode()
    return [SIZES.pack(len(text), sum(sizes)) + text, *(body for body in bodies if len(body))]


def _body(array: np.ndarray) -> bytes | memoryview:
    """An array's bytes; of texts each after its length, in four bytes."""
    if array.dtype == object:
        parts = ((len(each).to_bytes(4, "little"), each) for each in array.ravel())
        return b"".join(piece for pair in parts for piece in pair)
    return array.data.cast("B") if array.size else b""


def arrays_of(told: Sequence[Sequence[Any]], raw: memoryview) -> list[np.ndarray]:
    """The arrays of a message, which lie in its bytes."""
    found, place = [], 0
    for kind, shape, size in told:
        part = raw[place : place + size]
        place += size
        array = _texts(part) if kind == "texts" else np.frombuffer(part, np.dtype(kind))
        found.append(array.reshape(shape))
    return found


def _texts(raw: memoryview) -> np.ndarray:
    texts, place = [], 0
    while place < len(raw):
        end = place + 4 + int.from_bytes(raw[place : place + 4], "little")
        texts.append(bytes(raw[place + 4 : end]))
        place = end
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


class Model:
    """The open file.

    Attributes:
        signature: its inputs, and its outputs as far as they are known.
    """

    def __init__(self, file: str, runtime_file: str, threads: int, **beside: Any) -> None:
        self.runtime = loaded(runtime_file)
        self.predictor = self.runtime.open(Path(file), threads)
        self.signature: dict[str, Any] = {
            "inputs": self.predictor.signature,
            "outputs": [
                {"name": n, "dtype": "", "shape": None} for n in self.predictor.output_names
            ],
            "batched": False,
            "runtime": self.runtime.version(),
        }

    def run(self, arrays: Sequence[np.ndarray]) -> tuple[list[np.ndarray], dict[str, float]]:
        """The outputs, and what took how many milliseconds."""
        start = time.perf_counter()
        outputs = [plain(output) for output in self.predictor(*arrays)]
        return outputs, {"compute_ms": (time.perf_counter() - start) * 1e3}

    def warm_up(self) -> None:
        """Run it on zeros of one shape, then of another, and learn what varies in its outputs.

        A file that takes no zeros is warmed by the first requests, and not batched.
        """
        inputs = self.signature["inputs"]
        if any(item["shape"] is None for item in inputs):
            return
        try:
            one = self.run(zeros(inputs, 0, 1))[0]
        except Exception:
            return
        several = other = one
        joins = bool(inputs) and all(item["shape"] and varies(item["shape"][0]) for item in inputs)
        try:
            several = self.run(zeros(inputs, 0, OTHER))[0] if joins else one
            other = self.run(zeros(inputs, 1, OTHER if joins else 1))[0]
        except Exception:
            joins = joins and several is not one
        self.signature["outputs"] = [
            told(name, *runs)
            for name, *runs in zip(self.predictor.output_names, one, several, other, strict=True)
        ]
        pairs = zip(one, several, strict=True)
        self.signature["batched"] = joins and all(_grows(a, b) for a, b in pairs)


def _grows(one: np.ndarray, several: np.ndarray) -> bool:
    """Whether an output has one row for each example."""
    return one.ndim > 0 and (len(one), len(several)) == (1, OTHER)


def varies(size: Any) -> bool:
    return not isinstance(size, int)


def zeros(inputs: Sequence[dict[str, Any]], more: int, batch: int) -> list[np.ndarray]:
    """Inputs of zeros; the batch is ``batch``, other sizes that vary ``more`` than their least.

    Example:
        >>> item = {"name": "x", "dtype": "", "shape": [["b", 1, None], ["t", 2, 2], 5]}
        >>> [array.shape for array in zeros([item], 1, 3)]
        [(3, 2, 5)]
    """
    made = []
    for item in inputs:
        shape = []
        for dim, size in enumerate(item["shape"]):
            if varies(size):
                _, least, most = size
                wanted = max(least, batch) if dim == 0 else least + more
                size = wanted if most is None else min(most, wanted)
            shape.append(size)
        made.append(np.zeros(shape, np.dtype(item["dtype"] or "float32")))
    return made


def told(name: str, *runs: np.ndarray) -> dict[str, Any]:
    """An output as several runs had it; sizes that differ are -1.

    Example:
        >>> told("y", np.zeros((1, 3)), np.zeros((2, 3)))
        {'name': 'y', 'dtype': 'float64', 'shape': [-1, 3]}
    """
    first, ranks = runs[0], {array.ndim for array in runs}
    shape = None
    if len(ranks) == 1:
        sizes = zip(*(array.shape for array in runs), strict=True)
        shape = [each[0] if len(set(each)) == 1 else -1 for each in sizes]
    return {"name": name, "dtype": first.dtype.name, "shape": shape}


def plain(value: Any) -> np.ndarray:
    """An output as an array of numbers whose bytes lie in order.

    Raises:
        ValueError: it holds something else.
    """
    array: np.ndarray = np.asarray(value)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"an output holds {array.dtype}, not numbers")
    return np.require(array, requirements=("C",))


def loaded(path: str) -> Any:
    """The module in a file, apart from any package."""
    name = f"of_worker_{Path(path).stem}"  # not that of the package it wraps
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Session:
    """The other end of the socket."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.model: Any = None
        self.maker: Callable[..., Any] = Model

    def receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        head, body = SIZES.unpack(self.exactly(SIZES.size))
        said = json.loads(bytes(self.exactly(head)))
        return said, arrays_of(said["arrays"], memoryview(self.exactly(body)))

    def exactly(self, size: int) -> bytearray:
        """That many bytes; the process ends where there are no more."""
        found = bytearray(size)
        rest = memoryview(found)
        while rest:
            count = self.channel.recv_into(rest)
            if not count:
                os._exit(0)
            rest = rest[count:]
        return found

    def send(self, said: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        parts = message(said, arrays)
        if sum(map(len, parts)) < 2**16:
            self.channel.sendall(b"".join(parts))
            return
        for part in parts:
            self.channel.sendall(part)

    def answer(self) -> None:
        """Receive a message and answer it."""
        said, arrays = self.receive()
        try:
            if said["command"] == "open":
                sys.path.extend(said.pop("paths"))
                del said["command"], said["arrays"]
                maker = said.pop("maker", "")
                self.model = (loaded(maker).Model if maker else Model)(**said)
                self.model.warm_up()
                self.send({"signature": self.model.signature})
                return
            outputs, spent = self.model.run(arrays)
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            self.send({"error": f"{type(error).__name__}: {text}"[:LONGEST_ERROR]})
            return
        self.send(spent | {"memory": resident_bytes()}, outputs)


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def die_with_parent() -> None:
    """Let the system end this process with its parent, even amid an inference; where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent drains, then ends this
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a runtime prints is no answer
    session = Session(channel)
    for _ in itertools.repeat(None):
        session.answer()


if __name__ == "__main__":
    main()
