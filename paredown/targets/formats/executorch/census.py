"""What stands in an ExecuTorch file: the ops that XNNPACK runs, those left to others, the bytes.

A file is one flatbuffer with segments behind it; each delegate's segment is a flatbuffer of
XNNPACK's nodes and values. ExecuTorch ships the schemas of both, and ``flatc``, which reads them.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import math
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paredown.core.errors import UserError
from paredown.core.measurement import Census

PROGRAM = "schema/program.fbs"
XNNPACK = "backends/xnnpack/serialization/schema.fbs"
# XNNPACK's types and PyTorch's, by the names that all reports use.
TYPES = {
    **dict.fromkeys(("qint8", "qcint8", "qdint8", "qpint8", "quint8"), "int8"),
    **dict.fromkeys(("qint32", "qcint32", "int32"), "int32"),
    **dict.fromkeys(("qcint4", "qbint4"), "int4"),
    **{"fp32": "float", "fp16": "float16", "bf16": "bfloat16"},
}
SCALARS = {
    **{"FLOAT": ("float", 4), "HALF": ("float16", 2), "BFLOAT16": ("bfloat16", 2)},
    **{"DOUBLE": ("double", 8), "LONG": ("int64", 8), "INT": ("int32", 4), "SHORT": ("int16", 2)},
    **{"CHAR": ("int8", 1), "BYTE": ("uint8", 1), "BOOL": ("bool", 1)},
}
# What XNNPACK computes on integers too; a depthwise convolution in float is a batch norm's.
FUSABLE = {
    *("Conv2d", "FullyConnected", "Add", "Subtract", "Multiply"),
    *("MaxPooling2d", "GlobalAvgPooling2d", "StaticTranspose", "StaticReshape", "StaticSlice"),
    *("Concatenate2", "Concatenate3", "Concatenate4", "Concatenate5", "Clamp"),
}
NONE = 2**32 - 1  # an id that stands for no value
Value = dict[str, Any]
Node = tuple[str, list[int], int]
Size = tuple[str, int]


def census(path: Path | str) -> Census:
    """Ops by the type of what they read, those outside XNNPACK by their kernel's name; bytes.

    Raises:
        UserError: the file is no ExecuTorch program.
    """
    raw = Path(path).read_bytes()
    program, base = _program(raw, Path(path))
    plan = next(plan for plan in program["execution_plan"] if plan["name"] == "forward")
    integer: collections.Counter[str] = collections.Counter()
    floating: collections.Counter[str] = collections.Counter(_outside(plan))
    sizes: dict[Any, tuple[str, int]] = {}  # a constant's key -> its type and bytes
    unfused: list[str] = []
    for number, delegate in enumerate(plan["delegates"]):
        graph = _delegate(raw, base, program["segments"][delegate["processed"]["index"]])
        values, nodes = _values(graph), [_node(node) for node in graph["xnodes"]]
        for name, reads, _ in nodes:
            whole = name != "Convert" and any(_is_integer(values[n]) for n in reads)
            (integer if whole else floating)[name] += 1
        sizes |= dict(_constants(graph, values))
        unfused += [f"{name} in delegate {number}" for name in _unfused(nodes, values)]
    sizes |= dict(_constants_outside(plan))
    weights: collections.Counter[str] = collections.Counter()
    for kind, size in sizes.values():
        weights[kind] += size
    return Census(dict(integer), dict(floating), dict(weights), tuple(unfused))


def _is_integer(value: Value) -> bool:
    return TYPES.get(value["datatype"], "").startswith("int")


def _unfused(nodes: list[Node], values: dict[int, Value]) -> Iterator[str]:
    """Ops in float that read and write nothing but what is converted from and to integers."""
    made_by = {writes: name for name, _, writes in nodes}
    used_by: dict[int, set[str]] = {}
    for name, reads, _ in nodes:
        for read in reads:
            used_by.setdefault(read, set()).add(name)
    for name, reads, writes in nodes:
        computed = [n for n in reads if not values[n]["constant_buffer_idx"]]
        between = {made_by.get(n) for n in computed} == used_by.get(writes) == {"Convert"}
        if name in FUSABLE and between and not any(_is_integer(values[n]) for n in reads):
            yield name


def _constants(graph: dict[str, Any], values: dict[int, Value]) -> Iterator[tuple[Any, Size]]:
    """Key of each constant of a delegate -> its type and bytes; the same bytes have one key."""
    stored: list[dict[str, Any]] = graph["constant_data"]
    for value in values.values():
        place = value["constant_buffer_idx"]
        if place:
            kind = TYPES.get(str(value["datatype"]), str(value["datatype"]))
            yield stored[place]["named_key"], (kind, stored[place]["size"])
        scales = value["quantization"].get("scale_buffer_idx", 0)
        if scales:
            grouped = "group_size" in value["quantization"]
            kind = "bfloat16" if grouped else "float"
            yield stored[scales]["named_key"], (kind, stored[scales]["size"])


def _constants_outside(plan: dict[str, Any]) -> Iterator[tuple[Any, Size]]:
    for value in plan["values"]:
        tensor = value.get("val") or {}
        if tensor.get("data_buffer_idx"):
            kind, width = SCALARS.get(tensor["scalar_type"], (tensor["scalar_type"].lower(), 0))
            yield tensor["data_buffer_idx"], (kind, width * math.prod(tensor["sizes"]))


# --- reading ---------------------------------------------------------------------------------


def _program(raw: bytes, path: Path) -> tuple[dict[str, Any], int]:
    """The program's tables, and where its segments begin."""
    if raw[4:6] != b"ET" or raw[8:12] != b"eh00" or len(raw) < 40:
        raise UserError(f"{path}: is no ExecuTorch program.")
    size, base = struct.unpack_from("<QQ", raw, 16)
    return _tables(raw[:size], PROGRAM, path), base


def _delegate(raw: bytes, base: int, segment: dict[str, int]) -> dict[str, Any]:
    """One delegate's tables."""
    blob = raw[base + segment["offset"] :][: segment["size"]]
    offset, size = struct.unpack_from("<II", blob, 10)
    return _tables(blob[offset : offset + size], XNNPACK, Path("delegate"))


def _tables(raw: bytes, schema: str, path: Path) -> dict[str, Any]:
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("ExecuTorch is not installed: pip install 'paredown[executorch]'.")
    home = Path(next(iter(spec.submodule_search_locations)))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "tables.bin"
        source.write_bytes(raw)
        options = ["--json", "--strict-json", "--defaults-json", "--raw-binary", "-o", folder]
        command = map(str, [home / "data/bin/flatc", *options, home / schema, "--", source])
        done = subprocess.run([*command], capture_output=True, text=True, check=False)
        made = source.with_suffix(".json")
        if done.returncode or not made.exists():
            raise UserError(f"{path}: cannot be read: {done.stdout.strip()[:200]}")
        text = re.sub(r"(?<=[\s:])(-?)inf(?=[,\s])", r"\1Infinity", made.read_text())
        tables: dict[str, Any] = json.loads(text)
        return tables


def _values(graph: dict[str, Any]) -> dict[int, Value]:
    """Id -> the value's table, its quantization among it."""
    found = {}
    for value in graph["xvalues"]:
        inner = value["xvalue_union"]
        table = inner.get("tensor_value", inner)
        kind = table["datatype"].removeprefix("xnn_datatype_")
        quantization = inner.get("quant_params") or {}
        found[table["id_out"]] = {**table, "datatype": kind, "quantization": quantization}
    return found


def _node(node: dict[str, Any]) -> Node:
    """Name, ids of what it reads apart from weights, id of what it writes."""
    fields = node["xnode_union"]
    reads = [n for key, n in fields.items() if key.startswith("input") and key.endswith("_id")]
    name = node["xnode_union_type"].removeprefix("XNN")
    return name, [n for n in reads if n != NONE], fields["output_id"]


def _outside(plan: dict[str, Any]) -> Iterator[str]:
    """The kernels that run between delegates, arithmetic on sizes aside."""
    for chain in plan["chains"]:
        for instruction in chain["instructions"]:
            if instruction["instr_args_type"] == "KernelCall":
                name = plan["operators"][instruction["instr_args"]["op_index"]]["name"]
                if not name.startswith("executorch_prim"):
                    yield name
