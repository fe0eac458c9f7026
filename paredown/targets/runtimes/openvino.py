"""OpenVINO on a CPU: ``lower`` writes its intermediate representation (IR), ``open`` runs one.

The probe loads this file by its path in a process without PyTorch, so the module imports numpy
alone; what lowering needs stands in ``paredown/targets/formats/openvino/write.py``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paredown.core.measurement import Census
    from paredown.graph.model import Model
    from paredown.targets.runtimes import Batches


SUFFIX, COMPANIONS = ".xml", (".bin",)  # the graph, and the weights
FORMS = frozenset(
    {"int8", "int8-dynamic", "int8-weights", "int4", "int4-weights", "fp16"}
)  # besides float32; see paredown.graph.quantized.forms
SYMMETRIC: frozenset[int] = frozenset()
PAIRS = "within"  # of products, whose sums saturate at 16 bits on x86 without VNNI
INT8_BYTES = (4, 1950)  # of scales, and of the ops around a layer, as found in conv nets
PACKAGES = ("openvino", "onnx", "onnxscript")
IMPORTS = ("openvino",)  # by `open`; they start no threads that compute

SIZES = "paredown"  # a note in the file: names of the inputs' sizes that vary

INTEGERS = ("u8", "i8")
# Layers of the executed graph that compute; others move or convert values.
COMPUTING = frozenset(
    {
        *("Convolution", "Deconvolution", "FullyConnected", "MatMul", "Pooling", "Eltwise"),
        *("Reduce", "Subgraph", "AdaptivePooling", "Interpolate"),
    }
)
WEIGHTED = frozenset({"Convolution", "GroupConvolution", "MatMul"})
MOVERS = frozenset({"Reshape", "Transpose", "MaxPool", "Squeeze", "Unsqueeze", "StridedSlice"})


class Predictor:
    """An open model: call it with one array per input, get a tuple of arrays.

    A model whose shapes are fixed runs up to a tenth faster, so the shapes of the first call are
    compiled for; other ones, from the first that comes, run in a second compilation for any shape.
    """

    def __init__(self, model: Any, threads: int) -> None:
        self._model, self._settings = model, settings(model, threads)
        self.input_names = [item.get_any_name() for item in model.inputs]
        self.output_names = [item.get_any_name() for item in model.outputs]
        self.signature = _signature(model)
        self._first: Any = None  # for the shapes of the first call
        self._first_shapes: list[tuple[int, ...]] = []
        self._any: Any = None  # for all others

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        import openvino

        if len(arrays) != len(self.input_names):
            raise ValueError(f"expected {len(self.input_names)} inputs, got {len(arrays)}")
        for item, array in zip(self._model.inputs, arrays, strict=True):
            if not item.partial_shape.compatible(openvino.PartialShape(list(array.shape))):
                raise ValueError(
                    f"input {item.get_any_name()!r}: expected shape {item.partial_shape}, "
                    f"got {array.shape}"
                )
        request = self._request([array.shape for array in arrays])
        for index, array in enumerate(arrays):
            plain = np.require(array, requirements=("C", "W"))
            request.set_input_tensor(index, openvino.Tensor(plain, shared_memory=True))
        request.start_async()  # with `wait` 10 µs quicker than `infer`, which builds a dict
        request.wait()
        outputs = (request.get_output_tensor(index) for index in range(len(self.output_names)))
        return tuple(output.data.copy() for output in outputs)

    def _request(self, shapes: list[tuple[int, ...]]) -> Any:
        if self._first is None:
            fixed = self._model.clone()
            fixed.reshape(dict(enumerate(map(list, shapes))))
            self._first, self._first_shapes = self._compiled(fixed), shapes
        if shapes == self._first_shapes:
            return self._first
        if self._any is None:
            self._any = self._compiled(self._model)
        return self._any

    def _compiled(self, model: Any) -> Any:
        import openvino

        return openvino.compile_model(model, "CPU", self._settings).create_infer_request()


def _signature(model: Any) -> list[dict[str, Any]]:
    """Of each input its name, dtype and shape; the names of sizes that vary stand in the file."""
    told = model.get_rt_info(SIZES).value if model.has_rt_info(SIZES) else ""
    found = []
    for place, item in enumerate(model.inputs):
        names = told.split(";")[place].split(",") if told else []
        sizes: list[Any] = []
        for dim, size in enumerate(item.partial_shape):
            most = None if size.get_max_length() in (-1, 2**63 - 1) else size.get_max_length()
            name = names[dim] if names else "?"
            varies = [name or "?", max(1, size.get_min_length()), most]
            sizes.append(size.get_length() if size.is_static else varies)
        dtype = _dtype(item.element_type.get_type_name())
        dtype = "bool" if dtype == "boolean" else dtype
        found.append({"name": item.get_any_name(), "dtype": dtype, "shape": sizes})
    return found


def open(path: Path | str, threads: int = 1) -> Predictor:
    """Open an IR on the CPU with that many threads; it computes in the precision it is written in.

    Raises:
        ValueError: it is no model that OpenVINO reads.
    """
    return Predictor(read(Path(path)), threads)


def read(path: Path) -> Any:
    """The model of a file.

    Raises:
        ValueError: OpenVINO cannot read it; says why in a line.
    """
    import openvino

    try:
        return openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ValueError(plainly(error)) from None


def plainly(error: Exception) -> str:
    """What OpenVINO says, without where in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return said[0] if said else "it is no model that OpenVINO reads"


def settings(model: Any, threads: int) -> dict[str, Any]:
    """How a model is compiled: for latency, in one stream, in the precision it is written in.

    OpenVINO would else round to bfloat16 wherever the CPU has kernels for it, float16 too where
    there are none for that; such a CPU computes a float16 file in float32.
    """
    import openvino

    kinds = {
        output.get_element_type().get_type_name()
        for op in _following(model)
        if op.get_type_name() not in ("Parameter", "Convert", "Result")
        for output in op.outputs()
    }
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f16" if "f16" in kinds and "FP16" in able else "f32",
        "ENABLE_CPU_PINNING": False,  # a core may be another's
    }


def version() -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}"


def lower(model: Model, path: Path | str, data: Batches = ()) -> Path:
    """Write the model as an IR, the graph in ``path`` and the weights beside it, and check it.

    Raises:
        UserError: an op has no form in OpenVINO, or the file's outputs differ from the model's.
    """
    from paredown.core.errors import UserError
    from paredown.core.files import write_together
    from paredown.targets import parity
    from paredown.targets.devices import first
    from paredown.targets.formats.openvino import write

    path, model = Path(path), write.without_inner_roundings(model)
    try:
        graph, weights = write.encode(model)
    except RuntimeError as error:
        raise UserError(f"model: OpenVINO cannot take it: {plainly(error)}") from error
    write_together({path: graph, path.with_suffix(COMPANIONS[0]): weights})

    def worst_tensor(model: Model, _: Path) -> tuple[float, str] | None:
        return write.worst_tensor(model, lambda graph: Predictor(graph, 1))

    try:
        with first.opened(path, __file__) as predictor:
            parity.confirm(model, path, predictor, worst_tensor, data, PAIRS)
    except UserError:
        path.unlink()
        path.with_suffix(COMPANIONS[0]).unlink()
        raise
    return path


def open_inside(model: Model, path: Path | str, names: Collection[str]) -> None:
    """None: OpenVINO shows no inner values."""


def census(path: Path | str) -> Census:
    """Count the layers that the CPU really runs for this file, by the precision they run in.

    ``unfused`` names the ops with integer weights and inputs that run in float.
    """
    import openvino

    from paredown.core.measurement import Census

    model = read(Path(path))
    compiled = openvino.compile_model(model, "CPU", settings(model, 1))
    integer: dict[str, int] = {}
    floating: dict[str, int] = {}
    masks = {_name(op) for op in model.get_ops() if _is_mask(op)}
    runs_in: dict[str, str] = {}  # op of the file -> precision
    parts_run_in: dict[str, str] = {}  # the same of ops that were made of it
    for layer in _following(compiled.get_runtime_model()):
        facts = {key: value.astype(str) for key, value in layer.get_rt_info().items()}
        kind, precision = facts["layerType"], facts["runtimePrecision"].lower()
        names = facts["originalLayersNames"].split(",")
        for name in names:
            whole = itertools.accumulate(name.split("/"), "{}/{}".format)
            parts_run_in |= dict.fromkeys(whole, precision)  # "7/WithoutBiases" was made of "7"
            runs_in[name] = precision
        if kind not in ("Input", "Output"):
            computes = kind in COMPUTING and not masks & set(names)
            counts = integer if computes and precision in INTEGERS else floating
            counts[kind] = counts.get(kind, 0) + 1
    runs_in = parts_run_in | runs_in
    unfused = [op for op in map(_name, _integer_layers(model)) if runs_in.get(op) not in INTEGERS]
    return Census(integer, floating, _bytes_by_dtype(model), tuple(unfused))


def _following(model: Any) -> list[Any]:
    """The ops that do not follow from constants alone, in the order they run."""
    found: dict[str, Any] = {}
    for op in model.get_ordered_ops():
        is_input = op.get_type_name() == "Parameter"
        if is_input or any(_name(source) in found for source in _sources(op)):
            found[_name(op)] = op
    return list(found.values())


def _sources(op: Any) -> list[Any]:
    return [value.get_source_output().get_node() for value in op.inputs()]


def _name(op: Any) -> str:
    name: str = op.get_friendly_name()
    return name


def _is_mask(op: Any) -> bool:
    """Whether it gives or reads truth values, which OpenVINO keeps in bytes too."""
    values = [*op.outputs(), *op.inputs()]
    return any(value.get_element_type().get_type_name() == "boolean" for value in values)


def _integer_layers(model: Any) -> list[Any]:
    """The ops with weights whose weights and inputs are given as 8-bit integers."""
    weighted = [op for op in model.get_ordered_ops() if op.get_type_name() in WEIGHTED]
    return [op for op in weighted if all(_dequantizes(source) for source in _sources(op)[:2])]


def _dequantizes(op: Any) -> bool:
    """Whether its values were 8-bit integers, or fewer bits, and have only been moved since."""
    while op.get_type_name() in MOVERS:
        op = _sources(op)[0]
    if op.get_type_name() in ("Multiply", "Subtract"):
        return _dequantizes(_sources(op)[0])
    if op.get_type_name() == "Convert":
        return op.input(0).get_element_type().size <= 1
    return op.get_type_name() == "FakeQuantize"


def _dtype(name: str) -> str:
    """NumPy's name of one of OpenVINO's element types.

    Example:
        >>> _dtype("f32"), _dtype("bf16"), _dtype("i4"), _dtype("u8"), _dtype("boolean")
        ('float32', 'bfloat16', 'int4', 'uint8', 'boolean')
    """
    found = re.fullmatch(r"(bf|f|i|u)(\d+)", name)
    kinds = {"bf": "bfloat", "f": "float", "i": "int", "u": "uint"}
    return f"{kinds[found[1]]}{found[2]}" if found else name


def _bytes_by_dtype(model: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            kind = _dtype(op.get_element_type().get_type_name())
            found[kind] = found.get(kind, 0) + op.get_byte_size()
    return found
