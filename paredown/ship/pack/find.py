"""Where the tensors lie in a file: ONNX, safetensors, LiteRT; any other file by its statistics.

Only offsets are read, so a wrong guess costs bytes, never correctness: packing gives back the file
bit for bit whatever this finds.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from paredown.graph.doors.onnx.wire import fields, tensor_protos, varint, varints
from paredown.ship.pack.blocks import Layout

_BLOCK = 1 << 15  # bytes that are looked at together in an unknown file
_ROW = 512  # bytes of it that share a spread
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_INTEGERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
# ONNX TensorProto.DataType and LiteRT TensorType -> bytes of an element, whether it is a float
_ONNX = {1: (4, True), 10: (2, True), 16: (2, True), 11: (8, True), 6: (4, False), 7: (8, False)}
_ONNX |= {12: (4, False), 13: (8, False), 4: (2, False), 5: (2, False)}
_LITERT = {0: (4, True), 1: (2, True), 2: (4, False), 4: (8, False), 7: (2, False)}
_LITERT |= {10: (8, True), 18: (2, True)}


@dataclass(frozen=True)
class Tensor:
    """Bytes ``start`` to ``end`` of a file, and how they read."""

    start: int
    end: int
    layout: Layout


def tensors(path: Path, data: np.ndarray) -> list[Tensor]:
    """The tensors of a file, in order and apart from each other; ``data`` are its bytes (N,)."""
    view = memoryview(data.data)
    finders = {".onnx": _onnx, ".safetensors": _safetensors, ".tflite": _litert}
    finder = finders.get(path.suffix)
    try:
        found = list(finder(view)) if finder else []
    except (ValueError, struct.error, IndexError, KeyError, TypeError, RecursionError):
        found = []  # not what its name says: then as any other file
    return _apart(found or list(_by_statistics(data)), len(data))


def _apart(found: list[Tensor], size: int) -> list[Tensor]:
    made: list[Tensor] = []
    for tensor in sorted(found, key=lambda each: (each.start, each.end)):
        inside = (made[-1].end if made else 0) <= tensor.start < tensor.end <= size
        if inside:
            made.append(tensor)
    return made


def _layout(width: int, floats: bool, shape: list[int], size: int) -> Layout:
    """Rows are the first dimension; where the size does not fit the shape there are none."""
    elements = size // width
    if width == 1 and len(shape) > 1 and prod(shape) == size:
        fits = 1 < shape[0] < size
        return Layout(1, size // shape[0] if fits else 0, shapes=(tuple(shape),))
    rows = shape[0] if len(shape) > 1 and shape[0] > 0 else 1
    fits = rows > 1 and elements % rows == 0 and elements > rows
    return Layout(width, elements // rows if fits else 0, floats)


# --- ONNX: protocol buffers ------------------------------------------------------------------


def _onnx(view: memoryview) -> Iterator[Tensor]:
    """The raw data of every TensorProto."""
    for start, end in tensor_protos(view):
        yield from _tensor_proto(view, start, end)


def _tensor_proto(view: memoryview, start: int, end: int) -> Iterator[Tensor]:
    shape: list[int] = []
    kind, raw = 0, (0, 0)
    for number, a, b in fields(view, start, end):
        if number == 1:
            shape += [varint(view, a)[0]] if b - a == 0 else varints(view, a, b)
        elif number == 2:
            kind = varint(view, a)[0]
        elif number == 9:
            raw = (a, b)
    width, floats = _ONNX.get(kind, (1, False))
    if raw[1] > raw[0] and kind != 8:
        size = raw[1] - raw[0]
        yield Tensor(*raw, _layout(width, floats, shape, size))


# --- safetensors -----------------------------------------------------------------------------


def _safetensors(view: memoryview) -> Iterator[Tensor]:
    (length,) = struct.unpack_from("<Q", view)
    if length > min(len(view) - 8, 100_000_000):
        raise ValueError("not a safetensors file")
    header = json.loads(bytes(view[8 : 8 + length]))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        a, b = (8 + length + int(offset) for offset in entry["data_offsets"])
        kind = str(entry["dtype"])
        width = _FLOATS.get(kind) or _INTEGERS.get(kind, 1)
        shape = [int(size) for size in entry["shape"]]
        yield Tensor(a, b, _layout(width, kind in _FLOATS, shape, b - a))


# --- LiteRT: flatbuffers ---------------------------------------------------------------------


def _litert(view: memoryview) -> Iterator[Tensor]:
    """The buffers of the first subgraphs' tensors."""
    if bytes(view[4:8]) != b"TFL3":
        raise ValueError("not a LiteRT file")
    model = _u32(view, 0)
    buffers = list(_vector(view, model, 4))
    for subgraph in _vector(view, model, 2):
        for tensor in _vector(view, subgraph, 0):
            shape_at, type_at, buffer_at = (_field(view, tensor, n) for n in (0, 1, 2))
            buffer = buffers[_u32(view, buffer_at) if buffer_at else 0]
            start, size = _buffer(view, buffer)
            shape = _numbers(view, shape_at) if shape_at else []
            width, floats = _LITERT.get(view[type_at] if type_at else 0, (1, False))
            if size:
                yield Tensor(start, start + size, _layout(width, floats, shape, size))
            if quantization := _field(view, tensor, 4):
                yield from _scales(view, quantization + _u32(view, quantization))


def _scales(view: memoryview, table: int) -> Iterator[Tensor]:
    """The least, the most, the scales and the zero points of a QuantizationParameters table."""
    for number, width, floats in ((0, 4, True), (1, 4, True), (2, 4, True), (3, 8, False)):
        if at := _field(view, table, number):
            start = at + _u32(view, at)
            yield Tensor(start + 4, start + 4 + width * _u32(view, start), Layout(width, 0, floats))


def _buffer(view: memoryview, buffer: int) -> tuple[int, int]:
    """Where a buffer's bytes start and how many they are: inside the tables or behind them."""
    data = _field(view, buffer, 0)
    if data:
        start = data + _u32(view, data)
        return start + 4, _u32(view, start)
    offset, size = (_field(view, buffer, number) for number in (1, 2))
    if offset and size:
        return _u64(view, offset), _u64(view, size)
    return 0, 0


def _u32(view: memoryview, at: int) -> int:
    return int(struct.unpack_from("<I", view, at)[0])


def _u64(view: memoryview, at: int) -> int:
    return int(struct.unpack_from("<Q", view, at)[0])


def _field(view: memoryview, table: int, number: int) -> int:
    """Where a table's field stands; 0 where it has none."""
    vtable = table - struct.unpack_from("<i", view, table)[0]
    size = struct.unpack_from("<H", view, vtable)[0]
    if 4 + 2 * number >= size:
        return 0
    offset = struct.unpack_from("<H", view, vtable + 4 + 2 * number)[0]
    return table + int(offset) if offset else 0


def _vector(view: memoryview, table: int, number: int) -> Iterator[int]:
    """The tables in a table's field."""
    at = _field(view, table, number)
    if not at:
        return
    start = at + _u32(view, at)
    for index in range(_u32(view, start)):
        entry = start + 4 + 4 * index
        yield entry + _u32(view, entry)


def _numbers(view: memoryview, at: int) -> list[int]:
    start = at + _u32(view, at)
    count = min(_u32(view, start), 16)
    return list(struct.unpack_from(f"<{count}i", view, start + 4))


# --- anything else ---------------------------------------------------------------------------


def _by_statistics(data: np.ndarray) -> Iterator[Tensor]:
    """Stretches of blocks that read best as floats, by where their sign and exponent lie."""
    start, current = 0, Layout()
    for at in range(0, len(data), _BLOCK):
        block = data[at : at + _BLOCK]
        layout = _likely(block) if len(block) == _BLOCK else Layout()
        if layout != current:
            if current != Layout():  # else it is no tensor
                yield Tensor(start, at, current)
            start, current = at, layout
    if current != Layout():
        yield Tensor(start, len(data), current)


def _likely(block: np.ndarray) -> Layout:
    """float32 or 16-bit floats where the top byte of each element says less than the others."""
    planes = [_byte_entropy(block[n::4]) for n in range(4)]
    if planes[3] < 6 and planes[0] > planes[3] + 1.5:
        width = 2 if abs(planes[1] - planes[3]) < 0.5 else 4
        return Layout(width, _ROW // width, True)
    return Layout(1, _ROW) if min(planes) > 6 else Layout()


def _byte_entropy(values: np.ndarray) -> float:
    shares = np.bincount(values, minlength=256) / len(values)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())
