"""LiteRT, TensorFlow Lite's successor: ``lower`` writes a .tflite file, ``open`` runs one.

The probe loads this file by its path in a process without PyTorch, so the module imports numpy
alone. Lowering stands in ``litert_convert.py`` and works in a process of its own, since LiteRT's
converter talks, keeps global state and may abort; what edits a file stands in ``litert_file.py``.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paredown.core.measurement import Census
    from paredown.graph.model import Model
    from paredown.targets.runtimes import Batches


SUFFIX, COMPANIONS = ".tflite", ()
# besides float32; see paredown.graph.quantized.forms
FORMS = frozenset({"int8", "int8-dynamic", "int4", "int8-weights", "int4-weights", "fp16"})
SYMMETRIC = frozenset({4})  # bits of weights alone that may have no zero points
PAIRS = None  # products are added in 32 bits
INT8_BYTES = (8, 250)  # of scales, and of zero points and tensors, as found in conv nets
PACKAGES = ("litert-torch", "ai-edge-litert")
IMPORTS = (
    "ai_edge_litert.interpreter",
    "ai_edge_litert.schema_py_generated",
)  # by `open`; they start no threads that compute
IDENTIFIER = b"TFL3"  # bytes 4 to 8 of each such file

# Ops that change no value; the others compute.
MOVING_OPS = frozenset(
    {
        *("QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE", "PAD", "PADV2", "MIRROR_PAD", "CAST"),
        *("SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "UNPACK", "SQUEEZE", "EXPAND_DIMS"),
        *("BROADCAST_TO", "GATHER", "GATHER_ND", "TILE", "SHAPE", "REVERSE_V2", "PACK"),
        *("SPACE_TO_DEPTH", "DEPTH_TO_SPACE", "RESIZE_NEAREST_NEIGHBOR", "DYNAMIC_UPDATE_SLICE"),
        *("SELECT", "SELECT_V2"),
    }
)
WEIGHTED_OPS = frozenset(
    {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "CONV_3D", "TRANSPOSE_CONV"}
)
# Ops with an integer kernel, which run in float only where the converter did not fuse them.
FUSABLE_OPS = WEIGHTED_OPS | {
    *("ADD", "MUL", "SUB", "CONCATENATION", "AVERAGE_POOL_2D", "MAX_POOL_2D", "MEAN", "LOGISTIC"),
    *("TANH", "LEAKY_RELU", "RELU", "RELU6", "SUM"),
}
INTEGERS = frozenset({"int8", "uint8", "int4", "int2", "int16"})


class Predictor:
    """An open .tflite file: call it with one array per input, get a tuple of arrays.

    The file's shapes are those of the example it was made of. Another batch is cut into slices of
    that size, the last one filled up with its own first example, and the outputs are joined.
    """

    def __init__(self, interpreter: Any, facts: dict[str, Any]) -> None:
        self._interpreter = interpreter
        self._inputs = interpreter.get_input_details()
        self._outputs = interpreter.get_output_details()
        self.input_names = facts.get("inputs") or [item["name"] for item in self._inputs]
        self.output_names = facts.get("outputs") or [item["name"] for item in self._outputs]
        self._types = facts.get("types") or [np.dtype(i["dtype"]).name for i in self._outputs]
        self._batched: list[bool] | None = facts.get("batched")
        takes = facts.get("takes") or [np.dtype(i["dtype"]).name for i in self._inputs]
        self.signature = [
            {"name": name, "dtype": dtype, "shape": self._sizes(item["shape"])}
            for name, dtype, item in zip(self.input_names, takes, self._inputs, strict=True)
        ]

    def _sizes(self, shape: np.ndarray) -> list[Any]:
        sizes: list[Any] = [int(size) for size in shape]
        return sizes if self._batched is None else [["batch", 1, None], *sizes[1:]]

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        if len(arrays) != len(self._inputs):
            raise ValueError(f"expected {len(self._inputs)} inputs, got {len(arrays)}")
        shapes = [tuple(int(size) for size in item["shape"]) for item in self._inputs]
        if all(array.shape == shape for array, shape in zip(arrays, shapes, strict=True)):
            return self._run(arrays)
        if self._batched is None or not _differ_in_batch_alone(arrays, shapes):
            raise ValueError(
                f"expected inputs of shape {_told(shapes)}, got {_told([a.shape for a in arrays])}:"
                " a .tflite file has fixed shapes, those of the task's example"
            )
        return self._run_slices(arrays, shapes[0][0], self._batched)

    def _run(self, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
        for item, array in zip(self._inputs, arrays, strict=True):
            value = np.ascontiguousarray(array.astype(item["dtype"], copy=False))
            self._interpreter.set_tensor(item["index"], value)
        self._interpreter.invoke()
        return tuple(
            self._interpreter.get_tensor(item["index"]).astype(kind, copy=False)
            for item, kind in zip(self._outputs, self._types, strict=True)
        )

    def _run_slices(
        self, arrays: tuple[np.ndarray, ...], size: int, batched: list[bool]
    ) -> tuple[np.ndarray, ...]:
        count = len(arrays[0])
        made = []
        for start in range(0, count, size):
            places = np.minimum(np.arange(start, start + size), count - 1)
            made.append(self._run(tuple(array[places] for array in arrays)))
        joined = []
        for values, whole in zip(zip(*made, strict=True), batched, strict=True):
            if not whole:
                joined.append(values[0])
            else:
                rows = len(values[0]) // size  # of an output for each example
                joined.append(np.concatenate(values)[: count * rows])
        return tuple(joined)


def _differ_in_batch_alone(arrays: tuple[np.ndarray, ...], shapes: list[tuple[int, ...]]) -> bool:
    same = all(
        a.ndim == len(s) and a.shape[1:] == s[1:] for a, s in zip(arrays, shapes, strict=True)
    )
    return same and all(a.ndim > 0 and len(a) == len(arrays[0]) > 0 for a in arrays)


def _told(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(f"({', '.join(map(str, shape))})" for shape in shapes)


def open(path: Path | str, threads: int = 1) -> Predictor:
    """Open a .tflite file on the CPU, with XNNPACK's kernels and that many threads.

    Raises:
        ValueError: the file is no .tflite file, or is damaged.
    """
    check_identifier(Path(path))
    from ai_edge_litert.interpreter import Interpreter

    with _silence():
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    return Predictor(interpreter, read_facts(Path(path)))


def check_identifier(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(8)
    if head[4:] != IDENTIFIER:
        raise ValueError(f"{path.name} is not a .tflite file, or is damaged")


def read_facts(path: Path) -> dict[str, Any]:
    """What lowering left in the file's metadata: names, types and which outputs have a batch."""
    from ai_edge_litert import schema_py_generated as schema

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        root = schema.Model.GetRootAsModel(raw, 0)
        for n in range(root.MetadataLength()):
            if root.Metadata(n).Name() == b"paredown":
                place = root.Buffers(root.Metadata(n).Buffer())
                text = bytes(place.Data(i) for i in range(place.DataLength()))
                return json.loads(text)  # type: ignore[no-any-return]
    return {}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """LiteRT tells on standard error, from C++, that it uses XNNPACK."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def version() -> str:
    import ai_edge_litert

    return f"ai_edge_litert {ai_edge_litert.__version__}"


def lower(model: Model, path: Path | str, data: Batches = ()) -> Path:
    """Write the model as a .tflite file at the shapes of its example, and check it.

    Raises:
        UserError: LiteRT has no form of an op, or the file's outputs differ from the model's.
    """
    from paredown.core.errors import UserError
    from paredown.core.files import write_atomically
    from paredown.targets import parity
    from paredown.targets.runtimes.litert_worker import worker

    path = Path(path)
    write_atomically(path, worker().convert(model))
    try:
        predictor = worker().predictor(path)
        parity.confirm(model, path, predictor, lambda m, _: parity.worst_tensor(m, _run), data)
    except UserError:
        path.unlink()
        raise
    return path


def _run(model: Model) -> tuple[np.ndarray, ...]:
    """What the model's file gives for the example inputs."""
    from paredown.targets.runtimes.litert_worker import worker

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"model{SUFFIX}"
        made.write_bytes(worker().convert(model))
        return worker().predictor(made)(*[item.example.numpy() for item in model.inputs])


def open_inside(model: Model, path: Path | str, names: Collection[str]) -> None:
    """None: LiteRT shows no inner values."""


def census(path: Path | str) -> Census:
    """Count the file's ops by what they compute in, and its constants by type."""
    from paredown.core.measurement import Census
    from paredown.targets.formats.litert.edit import File, constant_bytes, operations

    check_identifier(Path(path))
    file = File(Path(path).read_bytes())
    integer: dict[str, int] = {}
    floating: dict[str, int] = {}
    for op in operations(file):
        computes = op.kind not in MOVING_OPS and INTEGERS & set(op.inputs)
        counts = integer if computes else floating
        counts[op.kind] = counts.get(op.kind, 0) + 1
    unfused = [op.place for op in operations(file) if _is_unfused(op)]
    return Census(integer, floating, constant_bytes(file), tuple(unfused))


def _is_unfused(op: Any) -> bool:
    """A float op between a dequantize and a quantize op; of one with weights, what follows does
    not matter, nor does its input where the weights alone are integers."""
    if op.kind not in FUSABLE_OPS or "float32" not in op.outputs or INTEGERS & set(op.inputs):
        return False
    made = [kind for kind in op.sources if kind != "constant"]
    if len(op.sources) > 1 and len(made) == 1 and op.kind in ("ADD", "SUB", "MUL"):
        return False  # constants in float do not fuse
    if op.kind in WEIGHTED_OPS:
        return made[:1] == ["DEQUANTIZE"] and op.sources[1] == "DEQUANTIZE"
    return set(made) == {"DEQUANTIZE"} and set(op.users) == {"QUANTIZE"}
