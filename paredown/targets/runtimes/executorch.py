"""ExecuTorch: ``lower`` writes a file for its XNNPACK backend, ``open`` runs one.

The probe loads this file by its path in a bare process, so the module imports numpy alone; what
lowering needs stands in ``paredown/targets/formats/executorch``. ExecuTorch's binding for Python
imports PyTorch: a process that runs such a file holds some 200 MB for it, which a program in C++
does not need.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paredown.core.measurement import Census
    from paredown.graph.model import Model
    from paredown.targets.runtimes import Batches


SUFFIX, COMPANIONS = ".pte", ()
PACKAGES = ("executorch",)
IMPORTS = (
    "torch",
    "executorch.extension.pybindings._C",
)  # by `open`; they start no threads that compute
FORMS = frozenset(
    {"int8", "int8-dynamic", "int8-weights", "int4-weights", "fp16"}
)  # besides float32; see paredown.graph.quantized.forms
SYMMETRIC = frozenset({4, 8})  # bits of weights alone that may have no zero points
PAIRS = None  # products are added in 32 bits
INT8_BYTES = (8, 700)  # of scales for each channel, of keys and padding for each layer
SIGNATURE = "paredown"  # a method of the file that returns names and shapes, as JSON


class Predictor:
    """An open ExecuTorch file: call it with one array per input, get a tuple of arrays.

    More examples than memory was planned for are run in parts.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self._path, self._threads, self._method = path, threads, None
        self._load()
        self.input_names = [item["name"] for item in self._signature["inputs"]]
        self.output_names = list(self._signature["outputs"])
        self.signature = [self._described(item) for item in self._signature["inputs"]]
        _alive.add(self)

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        self._check(arrays)
        if self._method is None:
            self._load()
        most = self._signature["inputs"][0]["shape"][0][1] if self._signature["parts"] else None
        if most is None or len(arrays[0]) <= most:
            return self._run(arrays)
        starts = range(0, len(arrays[0]), most)
        parts = [self._run([array[n : n + most] for array in arrays]) for n in starts]
        return tuple(np.concatenate(pieces) for pieces in zip(*parts, strict=True))

    def _run(self, arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        import torch

        assert self._method is not None
        tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
        try:
            outputs = self._method(tensors)
        except RuntimeError:
            with _muted() as said:  # once more, for what it prints
                try:
                    outputs = self._method(tensors)
                except RuntimeError as error:
                    reason = _reason(said(), error)
                    raise RuntimeError(f"ExecuTorch cannot run it: {reason}") from error
        return tuple(output.numpy() for output in outputs)  # copies: the binding clones them

    def _described(self, item: dict[str, Any]) -> dict[str, Any]:
        """An input, its sizes that vary as name, least and most."""
        if item["shape"] is None:
            return item
        sizes: list[Any] = []
        for dim, size in enumerate(item["shape"]):
            if not isinstance(size, int):
                name, most, *least = size
                unlimited = dim == 0 and self._signature["parts"]
                size = [name, max([1, *least]), None if unlimited else most]
            sizes.append(size)
        return item | {"shape": sizes}

    def _load(self) -> None:
        binding = _binding()
        with _muted() as said:
            try:
                _use_threads(binding, self._threads)
                program = binding._load_program(
                    str(self._path),
                    program_verification=binding.Verification.InternalConsistency,
                )
                self._signature = _signature(program)
                self._method = program.load_method("forward")
            except Exception as error:
                raise ValueError(
                    f"{self._path.name}: ExecuTorch cannot load it: {_reason(said(), error)}"
                ) from error
        self._program = program  # what the method lives in

    def _check(self, arrays: Sequence[np.ndarray]) -> None:
        """That the arrays are what the file takes: the binding itself checks only their bytes."""
        items = self._signature["inputs"]
        if len(arrays) != len(items):
            raise ValueError(f"expected {len(items)} inputs, got {len(arrays)}")
        sizes: dict[str, int] = {}
        for item, array in zip(items, arrays, strict=True):
            if item["dtype"] not in ("", array.dtype.name):
                raise ValueError(
                    f"input {item['name']!r}: expected {item['dtype']}, got {array.dtype.name}"
                )
            if item["shape"] is not None and not self._fits(item["shape"], array.shape, sizes):
                wanted = ", ".join(_shown(size) for size in item["shape"])
                raise ValueError(
                    f"input {item['name']!r}: expected shape ({wanted}), got {array.shape}"
                )

    def _fits(self, wanted: list[Any], shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
        """Whether a shape is one that the file takes; ``sizes`` are those of symbols so far."""
        if len(wanted) != len(shape):
            return False
        for dim, (size, got) in enumerate(zip(wanted, shape, strict=True)):
            if isinstance(size, int):
                if size != got:
                    return False
                continue
            symbol, most, *least = size
            unlimited = dim == 0 and self._signature["parts"]
            if (
                got < max([1, *least])
                or (got > most and not unlimited)
                or sizes.setdefault(symbol, got) != got
            ):
                return False
        return True


_alive: weakref.WeakSet[Predictor] = weakref.WeakSet()


def _shown(size: Any) -> str:
    if isinstance(size, int):
        return str(size)
    name, most, *least = size
    return f"{name} {least[0]} to {most}" if least else f"{name} up to {most}"


def _signature(program: Any) -> dict[str, Any]:
    """What the file says of its inputs and outputs; numbered names where another tool wrote it."""
    if SIGNATURE in [program.get_method_name(n) for n in range(program.num_methods())]:
        found: dict[str, Any] = json.loads(program.load_method(SIGNATURE)([])[0])
        return found
    meta = program.method_meta("forward")
    inputs = [{"name": f"input_{n}", "dtype": "", "shape": None} for n in range(meta.num_inputs())]
    outputs = [f"output_{n}" for n in range(meta.num_outputs())]
    return {"inputs": inputs, "outputs": outputs, "parts": False}


def _binding() -> Any:
    """ExecuTorch's runtime; the package's own entry would import its exporter, for seconds."""
    import torch  # noqa: F401  # whose libraries the binding links to
    from executorch.extension.pybindings import _C

    return _C


def _use_threads(binding: Any, threads: int) -> None:
    """Set the size of the pool that all open files share.

    A pool cannot be replaced under a method that uses it: those methods are loaded anew when they
    are called next.
    """
    if binding._threadpool_get_thread_count() != threads:
        for predictor in _alive:
            predictor._method = None
        binding._unsafe_reset_threadpool(threads)


def _reason(lines: list[str], error: Exception) -> str:
    """The line of what the runtime printed that says most, without the place in its source."""
    missing = [line for line in lines if "Missing operator" in line][-1:]
    failed = [line for line in lines if "Check failed" in line][:1]
    return re.sub(r"^\[\S+:\d+\] ", "", (missing or failed or lines or [str(error)])[-1]).strip()


@contextlib.contextmanager
def _muted() -> Iterator[Callable[[], list[str]]]:
    """Keep what the runtime prints; yields a function that returns its lines.

    It prints to the error stream of the process and, from its binding, to Python's.
    """
    with tempfile.TemporaryFile("w+", buffering=1) as kept, contextlib.redirect_stderr(kept):
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def said() -> list[str]:
            kept.flush()
            size = os.fstat(kept.fileno()).st_size
            text = os.pread(kept.fileno(), 10_000, max(0, size - 10_000)).decode(errors="replace")
            return [line for line in text.splitlines() if line.strip()]

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def open(path: Path | str, threads: int = 1) -> Predictor:
    """Open an ExecuTorch file on the CPU with that many threads.

    All open files of a process share their threads: opening one with another number changes it.

    Raises:
        ValueError: the file is not an ExecuTorch program, or damaged.
    """
    return Predictor(Path(path).absolute(), threads)


def version() -> str:
    from importlib.metadata import version

    return f"executorch {version('executorch')}"


def lower(model: Model, path: Path | str, data: Batches = ()) -> Path:
    """Write the model as an ExecuTorch file for XNNPACK, and check it.

    Raises:
        UserError: an op has no kernel, or the file's outputs differ from the model's; names the
            tensor that differs most.
    """
    from paredown.core.errors import UserError
    from paredown.core.files import write_atomically
    from paredown.targets import parity
    from paredown.targets.devices import first
    from paredown.targets.formats.executorch import write

    path = Path(path)
    write_atomically(path, write.encode(model, SIGNATURE))

    def worst_tensor(model: Model, _: Path) -> tuple[float, str] | None:
        return parity.worst_tensor(model, _run)

    try:
        with first.opened(path, __file__) as predictor:
            parity.confirm(model, path, predictor, worst_tensor, data)
    except (UserError, RuntimeError, ValueError) as error:
        path.unlink()
        raise UserError(str(error)) from error
    return path


def _run(model: Model) -> tuple[np.ndarray, ...]:
    """What the model's file gives for the example inputs."""
    from paredown.targets.formats.executorch import write

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"model{SUFFIX}"
        made.write_bytes(write.encode(model, SIGNATURE))
        return open(made)(*[item.example.numpy() for item in model.inputs])


def open_inside(model: Model, path: Path | str, names: Collection[str]) -> None:
    """None: ExecuTorch shows no inner values."""


def census(path: Path | str) -> Census:
    """Count the ops that XNNPACK runs for this file and, as ``aten::...``, those left outside."""
    from paredown.targets.formats.executorch import census as executorch_census

    return executorch_census.census(path)
