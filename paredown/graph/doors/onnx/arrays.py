"""A tensor of an ONNX file as an array: mapped where it lies in a file beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from paredown.core.errors import UserError
from paredown.graph.doors.onnx.program import Array

LARGEST_DIM = 1 << 40
# The element types that have a whole number of bytes and NumPy's own name.
PLAIN: dict[Any, str] = {
    **{TensorProto.FLOAT: "<f4", TensorProto.DOUBLE: "<f8", TensorProto.FLOAT16: "<f2"},
    **{TensorProto.INT8: "<i1", TensorProto.INT16: "<i2", TensorProto.INT32: "<i4"},
    **{TensorProto.INT64: "<i8", TensorProto.UINT8: "<u1", TensorProto.UINT16: "<u2"},
    **{TensorProto.UINT32: "<u4", TensorProto.UINT64: "<u8", TensorProto.BOOL: "?"},
}
FLOATING: dict[Any, str] = {
    **{TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"},
    **{TensorProto.DOUBLE: "float64", TensorProto.FLOAT8E4M3FN: "float8"},
    **{TensorProto.FLOAT8E5M2: "float8", TensorProto.FLOAT8E4M3FNUZ: "float8"},
    **{TensorProto.FLOAT8E5M2FNUZ: "float8"},
}
SMALL: dict[int, type] = {
    **{TensorProto.INT4: np.int8, TensorProto.UINT4: np.uint8},
    **{getattr(TensorProto, "INT2", -1): np.int8, getattr(TensorProto, "UINT2", -2): np.uint8},
}


def kind(number: int) -> str:
    """ONNX's name of an element type.

    Example:
        >>> kind(1), kind(99)
        ('FLOAT', 'type 99')
    """
    try:
        return str(TensorProto.DataType.Name(number))
    except ValueError:
        return f"type {number}"


def array_of(tensor: TensorProto, folder: Path) -> Array:
    """Its numbers; floats of other widths come as float32, integers of 4 bits as 8.

    Raises:
        UserError: its type is none that a net computes with, or its numbers are not as many as
            its shape says.
    """
    shape = tuple(tensor.dims)
    told = f"tensor {tensor.name!r}"
    if tensor.data_type == TensorProto.STRING:
        raise UserError(f"{told}: holds text; cut the file where text becomes numbers.")
    if tensor.data_type not in {*PLAIN, *FLOATING, *SMALL}:
        raise UserError(
            f"{told}: is {kind(tensor.data_type)}; expected floats, whole numbers or bool; export "
            "again in float."
        )
    if any(not 0 <= size < LARGEST_DIM for size in shape):
        raise UserError(f"{told}: its shape {shape} is no shape; the file is damaged.")
    if tensor.data_location == TensorProto.EXTERNAL:
        made = _outside(tensor, folder, shape)
    else:
        made = _inside(tensor, shape)
    if tensor.data_type in FLOATING:
        made = made.astype(np.float32)
    if tensor.data_type in SMALL:
        made = made.astype(SMALL[tensor.data_type])
    return made


def _inside(tensor: TensorProto, shape: tuple[int, ...]) -> Array:
    wanted = math.prod(shape)
    if tensor.data_type in PLAIN and tensor.HasField("raw_data"):
        raw = tensor.raw_data
        _check_size(tensor, len(raw), wanted * np.dtype(PLAIN[tensor.data_type]).itemsize)
        return np.frombuffer(raw, PLAIN[tensor.data_type]).reshape(shape)
    try:
        return np.asarray(numpy_helper.to_array(tensor)).reshape(shape)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(
            f"tensor {tensor.name!r}: does not hold the {wanted} numbers that its shape {shape} "
            "says; the file is damaged."
        ) from error


def _outside(tensor: TensorProto, folder: Path, shape: tuple[int, ...]) -> Array:
    """Mapped: read from the disk as it is used, and written to only in memory."""
    told = {entry.key: entry.value for entry in tensor.external_data}
    path, offset = folder / told["location"], int(told.get("offset", 0))
    if tensor.data_type not in PLAIN:
        return _inside(_loaded(tensor, path, offset, told.get("length")), shape)
    dtype = np.dtype(PLAIN[tensor.data_type])
    wanted = math.prod(shape) * dtype.itemsize
    there = path.stat().st_size - offset
    _check_size(tensor, int(told.get("length", there)), wanted)
    if not wanted:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "c", offset, shape)


def _loaded(tensor: TensorProto, path: Path, offset: int, length: str | None) -> TensorProto:
    with path.open("rb") as file:
        file.seek(offset)
        raw = file.read(-1 if length is None else int(length))
    made = onnx.TensorProto()
    made.name, made.data_type, made.raw_data = tensor.name, tensor.data_type, raw
    made.dims.extend(tensor.dims)
    return made


def _check_size(tensor: TensorProto, there: int, wanted: int) -> None:
    if there != wanted:
        raise UserError(
            f"tensor {tensor.name!r}: its shape {tuple(tensor.dims)} takes {wanted} bytes, and it "
            f"has {there}; the file is damaged."
        )


def attribute(proto: onnx.AttributeProto, folder: Path) -> Any:
    """An attribute as a plain value; an array where it is a tensor."""
    kinds = onnx.AttributeProto
    if proto.type == kinds.TENSOR:
        return array_of(proto.t, folder)
    if proto.type == kinds.STRING:
        return proto.s.decode("utf-8", "replace")
    if proto.type == kinds.STRINGS:
        return [each.decode("utf-8", "replace") for each in proto.strings]
    if proto.type in (kinds.FLOAT, kinds.INT):
        return proto.f if proto.type == kinds.FLOAT else proto.i
    if proto.type in (kinds.FLOATS, kinds.INTS):
        return list(proto.floats if proto.type == kinds.FLOATS else proto.ints)
    raise UserError(f"attribute {proto.name!r}: is of a kind that cannot be taken.")
