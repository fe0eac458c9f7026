"""ONNX Runtime, the default runtime: ``lower`` writes an ONNX file, ``open`` runs one.

The probe loads this file by its path in a process without PyTorch, so the module imports numpy
alone; what lowering needs stands in ``paredown/targets/formats/onnx/write.py``.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from paredown.core.measurement import Census
    from paredown.graph.model import Model
    from paredown.targets.runtimes import Batches, Inside


SUFFIX, COMPANIONS = ".onnx", ()
LIMITS = "paredown.limits"  # metadata: of each input, dimension -> its least and largest size
# besides float32; see paredown.graph.quantized.forms
FORMS = frozenset(
    {
        *("int8", "int8-dynamic", "int4", "int8-weights", "int4-weights"),
        *("binary", "ternary", "fp16"),
    }
)
SYMMETRIC: frozenset[int] = frozenset()
PAIRS = "across"  # of products, whose sums saturate at 16 bits on x86 without VNNI
INT8_BYTES = (8, 600)  # of scales, and of nodes and zero points, as found in conv nets
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
IMPORTS = ("onnxruntime",)  # by `open`; they start no threads that compute

# What an operator of the optimised graph computes in; the others move or cast data.
INTEGER_OPS = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat"),
        *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu"),
        *("QLinearSoftmax", "QLinearWhere", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger"),
        *(
            "DynamicQuantizeMatMul",
            "DynamicQuantizeLSTM",
            "QAttention",
            "MatMulNBits",
            "GatherBlockQuantized",
        ),
    }
)
# Ops with an integer kernel; what only moves values is not counted.
FUSABLE_OPS = frozenset(
    {
        *("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "Mul"),
        *("Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "MaxPool"),
    }
)
SINGLE_OPS = frozenset({"AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "MaxPool"})
PACKED = frozenset({"int4", "uint4"})  # two to a byte
ALWAYS_FUSED = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm"})  # whatever takes their output
DTYPES = {"float": "float32", "double": "float64"}  # where NumPy has another name
UNPACKED = (
    "ONNX Runtime unpacks {} weights when it opens the file: from there on memory and kernels are "
    "those of float weights, or of int8 ones where the layer's input is int8 too."
)


class Predictor:
    """An open ONNX file: call it with one array per input, get a tuple of arrays."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.input_names = [item.name for item in session.get_inputs()]
        self.output_names = [item.name for item in session.get_outputs()]
        facts = session.get_modelmeta().custom_metadata_map
        limits = json.loads(facts.get(LIMITS, "[]")) or [{} for _ in self.input_names]
        pairs = zip(session.get_inputs(), limits, strict=True)
        self.signature = [_described(item, within) for item, within in pairs]

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        feeds = dict(zip(self.input_names, arrays, strict=True))
        return tuple(self._session.run(None, feeds))


def _described(item: Any, limits: dict[str, Any]) -> dict[str, Any]:
    """Name, dtype and shape of an input; ``limits`` are those of its sizes that vary."""
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    sizes = [
        size if isinstance(size, int) else [size or "?", *limits.get(str(dim), (1, None))]
        for dim, size in enumerate(item.shape or ())
    ]
    return {"name": item.name, "dtype": DTYPES.get(kind, kind), "shape": sizes}


def open(path: Path | str, threads: int = 1) -> Predictor:
    """Open an ONNX file on the CPU with that many threads."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), session_options(threads), providers=["CPUExecutionProvider"]
    )
    return Predictor(session)


def session_options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def version() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def lower(model: Model, path: Path | str, data: Batches = ()) -> Path:
    """Write the model as an ONNX file that holds weights and graph only, and check it.

    Raises:
        UserError: an op has no ONNX form, ONNX Runtime crashes on the file, or the file's outputs
            differ from the model's; names the tensor that differs most.
    """
    from paredown.core.errors import UserError
    from paredown.core.files import write_atomically
    from paredown.core.memory import release
    from paredown.targets import parity
    from paredown.targets.devices import first
    from paredown.targets.formats.onnx import names, values, write

    path = Path(path)
    write_atomically(path, names.shortened(write.encode(model)))
    release(model.size_bytes)
    try:
        with first.opened(path, __file__) as predictor:
            parity.confirm(model, path, predictor, values.worst_tensor, data, PAIRS)
    except UserError:
        path.unlink()
        raise
    return path


def open_inside(model: Model, path: Path | str, names: Collection[str]) -> Inside:
    """What runs a file made of ``model`` and gives its outputs and the values of those nodes."""
    from paredown.targets.formats.onnx import values

    return values.open_inside(model, Path(path), names)


def optimise(path: Path, made: Path) -> None:
    """Write the graph that ONNX Runtime makes of a file to ``made``, and its weights beside."""
    import onnxruntime

    options = session_options(1)
    options.optimized_model_filepath = str(made)
    beside = "session.optimized_model_external_initializers_file_name"
    options.add_session_config_entry(beside, f"{made.name}.data")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def census(path: Path | str) -> Census:
    """Count the ops that ONNX Runtime really runs for this file."""
    import onnx

    from paredown.core.measurement import Census
    from paredown.targets.devices import first
    from paredown.targets.formats.onnx import bits
    from paredown.targets.formats.onnx.file import without_numbers

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "optimised.onnx"
        first.optimise(Path(path), __file__, made)
        nodes = list(without_numbers(made).graph.node)
    loaded = without_numbers(Path(path)).graph
    words = bits.words()
    low = {n.input[0]: words[n.op_type] for n in loaded.node if n.op_type in words}
    weights: dict[str, int] = {}
    for tensor in loaded.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
        count, kept = math.prod(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        held = -(-count // 2) if kind in PACKED else count * kept.itemsize
        kind = low.get(tensor.name, kind)
        weights[kind] = weights.get(kind, 0) + held
    integer: dict[str, int] = {}
    floating: dict[str, int] = {}
    for node in nodes:
        counts = integer if node.op_type in INTEGER_OPS else floating
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    notes = (UNPACKED.format(" and ".join(sorted(set(low.values())))),) if low else ()
    names = {tensor.name for tensor in loaded.initializer}
    layers = {tensor.name for tensor in loaded.initializer if len(tensor.dims) > 1}
    return Census(integer, floating, weights, tuple(unfused(nodes, names, layers)), notes)


def unfused(nodes: list[Any], held: set[str], layers: set[str]) -> list[str]:
    """Ops that could run on integers and do not; weights of the file, ``held`` in it as integers,
    that are dequantized at every inference. They are called by the weight that they read, where it
    is one of ``layers``: other names in the file say nothing."""
    made_by = {output: node.op_type for node in nodes for output in node.output}
    read_by = {output: node.input for node in nodes for output in node.output}
    used_by: dict[str, set[str]] = {}
    for node in nodes:
        for name in node.input:
            used_by.setdefault(name, set()).add(node.op_type)
    found = []
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in held:
            found.append(f"DequantizeLinear {node.input[0]}")
        if node.op_type not in FUSABLE_OPS:
            continue
        sources = [made_by[name] for name in node.input if name in made_by]
        operands = 1 if node.op_type in SINGLE_OPS else 2  # constants in float do not fuse
        users = set().union(*(used_by.get(name, set()) for name in node.output))
        between = node.op_type in ALWAYS_FUSED or users == {"QuantizeLinear"}
        integers = len(sources) >= operands and set(sources) == {"DequantizeLinear"}
        if integers and between:
            read = [*node.input, *(each for name in node.input for each in read_by.get(name, ()))]
            weight = next((name for name in read if name in layers), node.output[0])
            found.append(f"{node.op_type} {weight.removesuffix('_quantized')}")
    return found
