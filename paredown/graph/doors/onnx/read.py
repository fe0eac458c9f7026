"""An ONNX file -> a `Program`: looked at field by field before anything is believed of it."""

from __future__ import annotations

import graphlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from paredown.core.errors import UserError
from paredown.graph.doors.onnx import arrays
from paredown.graph.doors.onnx.beside import weights_of
from paredown.graph.doors.onnx.ops import OPS
from paredown.graph.doors.onnx.program import Array, Node, Program, inner
from paredown.graph.doors.opened import Wanted

DEFAULT = ("", "ai.onnx")
LARGEST_COPY = 1 << 28  # bytes of a file that is copied to write an op in others


@dataclass(frozen=True)
class Read:
    """What a file holds.

    Attributes:
        shapes: the declared shapes of its outputs, None where there is none.
        notes: sentences on what was read otherwise than it stands there.
        card: what the file tells of its origin.
    """

    program: Program
    inputs: tuple[Wanted, ...]
    shapes: tuple[tuple[int | str | None, ...] | None, ...]
    notes: tuple[str, ...]
    card: dict[str, str]


def read(path: Path) -> Read:
    """The graph in a file.

    Raises:
        UserError: it is no ONNX file, or damaged, or newer than what is known here, or holds
            what no net computes with.
    """
    try:
        weights_of(path)
        proto = onnx.load_model(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (DecodeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is no ONNX file, or a damaged one: {error}.") from error
    return read_proto(proto, path)


def read_proto(proto: onnx.ModelProto, path: Path) -> Read:
    """The same of a file that is in memory, whose external data lie beside ``path``."""
    versions = _versions(proto, path)
    if proto.functions:
        proto = _inlined(proto, path)
        versions = {**versions, **_versions(proto, path)}
    proto = _expanded(proto)
    if not proto.graph.node:
        raise UserError(f"{path}: its graph has no nodes; there is nothing to compress.")
    reader = _Reader(path, versions, Counter())
    program = reader.graph(proto.graph, frozenset())
    known = program.known
    inputs = tuple(_wanted(each, path) for each in proto.graph.input if each.name not in known)
    if not inputs:
        raise UserError(f"{path}: its graph has no inputs; there is nothing to feed it.")
    shapes = tuple(_shape(each) for each in proto.graph.output)
    notes = [*reader.notes()]
    defaults = [each.name for each in proto.graph.input if each.name in known]
    if defaults:
        notes.append(
            f"{len(defaults)} of the file's inputs have values in it, such as {defaults[0]!r}: "
            "they are weights here, and no inputs"
        )
    card = {"Exported by": f"{proto.producer_name} {proto.producer_version}".strip()}
    return Read(program, inputs, shapes, tuple(notes), {k: v for k, v in card.items() if v})


def _versions(proto: onnx.ModelProto, path: Path) -> dict[str, int]:
    """Domain -> its opset; that of ONNX's own is looked at."""
    found = {
        "" if each.domain in DEFAULT else each.domain: each.version for each in proto.opset_import
    }
    newest = onnx.defs.onnx_opset_version()
    version = found.get("", 0)
    if version > newest:
        raise UserError(
            f"{path}: is of opset {version}, and {newest} is the newest that is known here; export "
            f"it again at opset {newest} or below, or update onnx."
        )
    if version < 1:
        found[""] = 1 if proto.ir_version < 3 else newest
    return found


def _inlined(proto: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Without functions of its own: their nodes stand where they were called."""
    from onnx import inliner

    try:
        return inliner.inline_local_functions(proto)
    except Exception as error:  # whatever is wrong with them
        raise UserError(f"{path}: its functions cannot be put in place: {error}.") from error


def _expanded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """With ops that are unknown here as ONNX itself writes them in others, where it does."""
    from onnx import inliner

    unknown = {
        ("", node.op_type)
        for node in proto.graph.node
        if node.domain in DEFAULT and node.op_type not in {*OPS, "Constant", "If"}
    }
    if not unknown or proto.ByteSize() > LARGEST_COPY:
        return proto
    try:
        return inliner.inline_selected_functions(
            proto, sorted(unknown), inline_schema_functions=True
        )
    except Exception:  # then the op is told when it is met
        return proto


@dataclass(frozen=True)
class _Reader:
    path: Path
    versions: dict[str, int]
    widths: Counter[str]  # float types that become float32 -> how many tensors

    def graph(self, proto: onnx.GraphProto, outer: frozenset[str]) -> Program:
        """A graph; ``outer`` are the names that a graph around it gives."""
        if proto.sparse_initializer:
            raise UserError(f"{self.path}: holds sparse tensors; export again with dense ones.")
        known: dict[str, Array] = {}
        for tensor in proto.initializer:
            if not isinstance(tensor.name, str):
                raise UserError(f"{self.path}: is damaged: the name of a tensor is no text.")
            if tensor.name in known:
                raise UserError(f"{self.path}: two tensors are named {tensor.name!r}.")
            known[tensor.name] = self.array(tensor)
        weights = frozenset(known)
        given = {each.name for each in proto.input} | set(known)
        names = frozenset(given) | outer
        nodes = []
        for each in proto.node:
            if each.op_type == "Constant" and each.domain in DEFAULT:
                known[each.output[0]] = self.constant(each)
            else:
                nodes.append(self.node(each, names | {n for e in proto.node for n in e.output}))
        self.check_names(proto, given)
        inputs = tuple(each.name for each in proto.input if each.name not in weights)
        outputs = tuple(each.name for each in proto.output)
        ordered = self.sorted(nodes)
        self.check_given(ordered, names | set(known), outputs)
        return Program(tuple(ordered), known, inputs, outputs, weights)

    def array(self, tensor: onnx.TensorProto) -> Array:
        if tensor.data_type in arrays.FLOATING:
            self.widths[arrays.FLOATING[tensor.data_type]] += 1
        return arrays.array_of(tensor, self.path.parent)

    def constant(self, proto: onnx.NodeProto) -> Array:
        """The value of a Constant node."""
        for each in proto.attribute:
            if each.name == "value":
                return self.array(each.t)
            if each.name in ("value_float", "value_floats"):
                return np.array(arrays.attribute(each, self.path.parent), np.float32)
            if each.name in ("value_int", "value_ints"):
                return np.array(arrays.attribute(each, self.path.parent), np.int64)
        raise UserError(
            f"node {proto.name or proto.output[0]!r} (Constant): holds text or a sparse tensor; "
            "export again with dense numbers."
        )

    def node(self, proto: onnx.NodeProto, names: frozenset[str]) -> Node:
        told = [proto.op_type, proto.domain, proto.name, *proto.input, *proto.output]
        told += [each.name for each in proto.attribute]
        if not all(isinstance(each, str) for each in told):  # what is no UTF-8 comes as bytes
            raise UserError(f"{self.path}: is no ONNX file, or a damaged one: a name is no text.")
        domain = "" if proto.domain in DEFAULT else proto.domain
        attributes = {}
        for each in proto.attribute:
            if each.type == onnx.AttributeProto.GRAPH:
                if proto.op_type == "If":
                    attributes[each.name] = self.graph(each.g, names)
            else:
                attributes[each.name] = arrays.attribute(each, self.path.parent)
        return Node(
            f"{domain}.{proto.op_type}" if domain else proto.op_type,
            tuple(proto.input),
            tuple(proto.output),
            attributes,
            proto.name,
            self.versions.get(domain, 1),
        )

    def check_names(self, proto: onnx.GraphProto, given: set[str]) -> None:
        """Each name is given once."""
        seen = set(given)
        for each in proto.node:
            for name in filter(None, each.output):
                if name in seen:
                    raise UserError(
                        f"{self.path}: the name {name!r} is given twice, the second time by "
                        f"node {each.name or name!r} ({each.op_type}); the file is damaged."
                    )
                seen.add(name)

    def sorted(self, nodes: list[Node]) -> list[Node]:
        """The nodes in an order they can run in; as they are, where that is one."""
        makers = {name: place for place, node in enumerate(nodes) for name in node.outputs if name}
        before: dict[int, set[int]] = {}
        in_order = True
        for place, node in enumerate(nodes):
            reads = set(node.inputs).union(*(set(graph.uses()) for graph in inner(node)))
            before[place] = {makers[name] for name in reads if name in makers}
            in_order = in_order and all(each < place for each in before[place])
        if in_order:
            return nodes
        try:
            order = list(graphlib.TopologicalSorter(before).static_order())
        except graphlib.CycleError as error:
            first = nodes[error.args[1][0]]
            raise UserError(
                f"{self.path}: {first.told()} depends on itself, by way of "
                f"{len(error.args[1]) - 1} nodes; a graph with a circle cannot run."
            ) from error
        return [nodes[place] for place in order]

    def check_given(self, nodes: list[Node], given: Iterable[str], outputs: Iterable[str]) -> None:
        """Whatever is read is given."""
        there = set(given) | {name for node in nodes for name in node.outputs}
        for node in nodes:
            for name in filter(None, node.inputs):
                if name not in there:
                    raise UserError(
                        f"{self.path}: {node.told()} reads {name!r}, which nothing gives; the "
                        "file is damaged, or was cut in the wrong place."
                    )
        for name in outputs:
            if name not in there:
                raise UserError(
                    f"{self.path}: output {name!r} is given by no node; the file is damaged."
                )

    def notes(self) -> list[str]:
        return [
            f"{count} tensors of the file are {name}; they are float32 here, and the model "
            'computes in float32: Cast("fp16") makes 16 bits of it again'
            for name, count in sorted(self.widths.items())
        ]


def _wanted(proto: onnx.ValueInfoProto, path: Path) -> Wanted:
    """An input as the file declares it."""
    if proto.type.WhichOneof("value") != "tensor_type":
        raise UserError(
            f"{path}: input {proto.name!r} is no tensor but a sequence, a map or an optional "
            "value; export again with tensors."
        )
    number: Any = proto.type.tensor_type.elem_type
    if number not in {*arrays.PLAIN, *arrays.FLOATING}:
        raise UserError(
            f"{path}: input {proto.name!r} is {arrays.kind(number)}; expected floats, whole "
            "numbers or bool."
        )
    floating = number in arrays.FLOATING
    dtype = "float32" if floating else np.dtype(arrays.PLAIN[number]).name
    return Wanted(proto.name, dtype, _shape(proto) or ())


def _shape(proto: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """The declared shape; None where there is none."""
    tensor = proto.type.tensor_type
    if proto.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        return None
    return tuple(_size(each) for each in tensor.shape.dim)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    return str(dim.dim_param) or None


def with_known(read: Read, values: dict[str, Array]) -> Read:
    """The same where some of the inputs have values that never change."""
    program = read.program
    made = replace(
        program,
        known={**program.known, **values},
        inputs=tuple(name for name in program.inputs if name not in values),
    )
    return replace(
        read,
        program=made,
        inputs=tuple(each for each in read.inputs if each.name not in values),
    )
