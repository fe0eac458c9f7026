"""The flatbuffer of a .tflite file: read, edited in place, written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

IDENTIFIER = b"TFL3"
ALIGNMENT = 16  # bytes: kernels read a weight in words of that size
SIGNATURE = b"serving_default"
FACTS = b"paredown"  # the metadata entry that holds what TFLite itself has no place for

TYPES = {n: name.lower() for name, n in vars(schema.TensorType).items() if isinstance(n, int)}
OPS = {n: name for name, n in vars(schema.BuiltinOperator).items() if isinstance(n, int)}


class File:
    """A .tflite file whose graph can be edited.

    Attributes:
        root: the flatbuffer as objects.
        graph: its main subgraph: ``tensors``, ``operators``, ``inputs`` and ``outputs``. Others are
            bodies of its ops, such as what a window is reduced by, and stay as they are.
    """

    def __init__(self, raw: bytes) -> None:
        self.root = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(raw, 0))
        self.graph = self.root.subgraphs[0]

    def encode(self) -> bytes:
        """The file's bytes; what no op reads any more is left out."""
        _drop_unused(self)
        self.root.buffers = [_Buffer(buffer.data) for buffer in self.root.buffers]
        size = sum(len(buffer.data) for buffer in self.root.buffers)
        builder = _Builder(size + 2**16)
        builder.Finish(self.root.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def kind(self, op: Any) -> str:
        """The op's name in TFLite, such as ``CONV_2D``."""
        code = self.root.operatorCodes[op.opcodeIndex]
        name = OPS[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return code.customCode.decode() if name == "CUSTOM" else name

    def constant(self, tensor: Any) -> np.ndarray | None:
        """The bytes of a constant, or None where the tensor is computed."""
        data = self.root.buffers[tensor.buffer].data
        return None if data is None or len(data) == 0 else data

    def producers(self) -> dict[int, Any]:
        """Index of a tensor -> the op that computes it."""
        return {int(index): op for op in self.graph.operators for index in op.outputs}

    def readers(self) -> dict[int, list[Any]]:
        """Index of a tensor -> the ops that read it."""
        found: dict[int, list[Any]] = {}
        for op in self.graph.operators:
            for index in op.inputs:
                found.setdefault(int(index), []).append(op)
        return found

    def tensors(self, indices: Any) -> list[Any]:
        """The tensors of these indices; an optional input that is absent is left out."""
        return [self.graph.tensors[index] for index in indices if index >= 0]

    def add_constant(self, array: np.ndarray) -> int:
        """The index of a new constant tensor."""
        tensor, data = schema.TensorT(), np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.replace_constant(tensor, data, array.dtype.name)
        tensor.shape = np.array(array.shape, np.int32)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def replace_constant(self, tensor: Any, data: np.ndarray, kind: str) -> None:
        """Other bytes and another type for a constant; what shares its buffer keeps the old."""
        buffer = schema.BufferT()
        buffer.data = data
        self.root.buffers.append(buffer)
        tensor.buffer = len(self.root.buffers) - 1
        tensor.type = next(number for number, name in TYPES.items() if name == kind)

    def reroute(self, old: int, new: int) -> None:
        """Let everything that reads one tensor read another."""
        for op in self.graph.operators:
            op.inputs = np.where(op.inputs == old, new, op.inputs).astype(np.int32)
        self.graph.outputs = np.where(self.graph.outputs == old, new, self.graph.outputs)

    def erase(self, gone: Any) -> None:
        """Take an op out of the graph."""
        self.graph.operators = [op for op in self.graph.operators if op is not gone]

    def insert_before(self, place: Any, made: Any) -> None:
        """Put a new op into the graph before another."""
        index = next(n for n, op in enumerate(self.graph.operators) if op is place)
        self.graph.operators.insert(index, made)

    def add_like(self, shape: Any, like: Any) -> int:
        """The index of a new computed tensor, of the type and the scale of another."""
        tensor = schema.TensorT()
        tensor.type, tensor.quantization, tensor.shape = like.type, like.quantization, shape
        tensor.buffer = 0
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def op(self, name: str, version: int, inputs: list[int], outputs: list[int]) -> Any:
        """A new op without options, which is not in the graph yet."""
        made = schema.OperatorT()
        made.opcodeIndex = self.op_code(name, version)
        made.inputs, made.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        return made

    def op_code(self, name: str, version: int) -> int:
        """The index under which ops of that name are listed, at that version or above."""
        number = getattr(schema.BuiltinOperator, name)
        for index, code in enumerate(self.root.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number:
                code.version = max(code.version, version)
                return index
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        code.version = version
        self.root.operatorCodes.append(code)
        return len(self.root.operatorCodes) - 1


class _Builder(flatbuffers.Builder):
    """Writes equal vectors once: the zero points of all weights, above all, 8 bytes a channel."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._places: dict[tuple[str, bytes], int] = {}

    def CreateNumpyVector(self, x: np.ndarray) -> int:
        key = (x.dtype.str, x.tobytes())
        if key not in self._places:
            self._places[key] = super().CreateNumpyVector(x)
        return self._places[key]


class _Buffer:
    """A buffer that packs itself at a multiple of `ALIGNMENT`, which the generated one does not."""

    def __init__(self, data: np.ndarray | None) -> None:
        self.data = b"" if data is None else np.ascontiguousarray(data).tobytes()

    def Pack(self, builder: flatbuffers.Builder) -> int:
        vector = None
        if self.data:
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = self.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)  # type: ignore[no-any-return]


def _drop_unused(file: File) -> None:
    """Leave out tensors, buffers and op codes that nothing refers to; equal buffers become one."""
    graph, root = file.graph, file.root
    used = dict.fromkeys(int(i) for i in [*graph.inputs, *graph.outputs] if i >= 0)
    for op in graph.operators:
        used |= dict.fromkeys(int(i) for i in [*op.inputs, *op.outputs] if i >= 0)
    blocks = [graph.tensors[old].quantization for old in used]
    scales = [grid.details for grid in blocks if grid is not None and grid.details is not None]
    used |= dict.fromkeys(int(each.scales) for each in scales)
    place = {old: new for new, old in enumerate(sorted(used))}
    for each in scales:
        each.scales = place[int(each.scales)]
    graph.tensors = [graph.tensors[old] for old in sorted(used)]

    def moved(indices: Any) -> np.ndarray:
        return np.array([place.get(int(index), -1) for index in indices], np.int32)

    graph.inputs, graph.outputs = moved(graph.inputs), moved(graph.outputs)
    for op in graph.operators:
        op.inputs, op.outputs = moved(op.inputs), moved(op.outputs)
    for signature in root.signatureDefs or []:
        for entry in [*signature.inputs, *signature.outputs]:
            entry.tensorIndex = place[entry.tensorIndex]
    _drop_buffers(file)
    operators = [op for each in root.subgraphs for op in each.operators or []]
    codes = sorted({op.opcodeIndex for op in operators})
    root.operatorCodes = [root.operatorCodes[old] for old in codes]
    for op in operators:
        op.opcodeIndex = codes.index(op.opcodeIndex)


def _drop_buffers(file: File) -> None:
    kept, index = [schema.BufferT()], {b"": 0}
    tensors = [tensor for each in file.root.subgraphs for tensor in each.tensors]
    for owner in [*tensors, *(file.root.metadata or [])]:
        data = file.root.buffers[owner.buffer].data
        key = b"" if data is None else data.tobytes()
        if key not in index:
            index[key] = len(kept)
            kept.append(file.root.buffers[owner.buffer])
        owner.buffer = index[key]
    file.root.buffers = kept


# --- edits -----------------------------------------------------------------------------------


def name(file: File, inputs: list[str], outputs: list[str]) -> None:
    """Give the inputs and outputs, in the graph's order, these names; inner tensors lose theirs."""
    graph, signature = file.graph, schema.SignatureDefT()
    for tensor in graph.tensors:
        tensor.name = None
    signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
    signature.inputs = [_entry(n, i) for n, i in zip(inputs, graph.inputs, strict=True)]
    signature.outputs = [_entry(n, i) for n, i in zip(outputs, graph.outputs, strict=True)]
    for entry in [*signature.inputs, *signature.outputs]:
        graph.tensors[entry.tensorIndex].name = entry.name
    file.root.signatureDefs = [signature]
    file.root.description, graph.name = b"paredown", b"main"


def _entry(label: str, index: Any) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = label.encode(), int(index)
    return entry


def note(file: File, facts: dict[str, Any]) -> None:
    """Keep facts in the file's metadata, as JSON, in place of the converter's."""
    entry, buffer = schema.MetadataT(), schema.BufferT()
    buffer.data = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    file.root.buffers.append(buffer)
    entry.name, entry.buffer = FACTS, len(file.root.buffers) - 1
    kept = [m for m in file.root.metadata or [] if m.name == b"min_runtime_version"]
    file.root.metadata = [*kept, entry]


# --- what a file runs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One op of a file.

    Attributes:
        kind: its name in TFLite.
        place: its kind and its position in the file.
        inputs, outputs: the types of its tensors.
        sources: for each input what made it: an op's kind, "constant" or "input".
        users: the kinds of the ops that read its results.
    """

    kind: str
    place: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sources: tuple[str, ...]
    users: tuple[str, ...]


def operations(file: File) -> list[Operation]:
    """The file's ops in the order they run."""
    made_by, read_by = file.producers(), file.readers()

    def source(index: int) -> str:
        if index in made_by:
            return file.kind(made_by[index])
        held = file.constant(file.graph.tensors[index])
        return "input" if held is None else "constant"

    return [
        Operation(
            file.kind(op),
            f"{file.kind(op)} {position}",
            tuple(TYPES[tensor.type] for tensor in file.tensors(op.inputs)),
            tuple(TYPES[tensor.type] for tensor in file.tensors(op.outputs)),
            tuple(source(int(index)) for index in op.inputs if index >= 0),
            tuple(file.kind(user) for index in op.outputs for user in read_by.get(int(index), [])),
        )
        for position, op in enumerate(file.graph.operators)
    ]


def constant_bytes(file: File) -> dict[str, int]:
    """Type -> bytes of the file's constants; a buffer that several share counts once."""
    found: dict[str, int] = {}
    seen = set()
    for tensor in file.graph.tensors:
        data = file.constant(tensor)
        if data is not None and tensor.buffer not in seen:
            seen.add(tensor.buffer)
            found[TYPES[tensor.type]] = found.get(TYPES[tensor.type], 0) + len(data)
    return found
