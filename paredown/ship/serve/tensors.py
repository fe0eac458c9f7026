"""One tensor of the Open Inference Protocol v2: numbers in JSON or raw bytes <-> an array.

Arrays are row-major and little-endian. A ``BYTES`` tensor is an array of `bytes` objects; ``BF16``
travels in two bytes each and is a float32 array here, for NumPy has no such type.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paredown.ship.serve.refused import Refused

MOST_BYTES = 64 * 2**20  # of all tensors of a request, as arrays
MOST_DIMS = 32  # NumPy's, before 2.0
DTYPES = {  # datatype of the protocol -> of the array
    **{"BOOL": "bool", "FP16": "float16", "FP32": "float32", "FP64": "float64"},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"BF16": "float32", "BYTES": "object"},
}
DATATYPES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
DATATYPES |= {"bfloat16": "BF16", "str": "BYTES"}
ALLOWED: dict[str, set[type]] = {"b": {bool}, "f": {int, float}}  # by kind; else whole
LENGTH = np.dtype("<u4")  # before each element of a BYTES tensor


def shape_of(name: str, value: Any) -> tuple[int, ...]:
    """The shape that a request gives.

    Raises:
        Refused: it is no list of whole numbers from 0 up, or of more elements than are taken.

    Example:
        >>> shape_of("x", [2, 3])
        (2, 3)
    """
    sizes = isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
    if not sizes or len(value) > MOST_DIMS:
        raise Refused(400, f"input {name!r}: expected 'shape' to be a list of sizes.")
    if math.prod(value) > MOST_BYTES:
        most = f"{MOST_BYTES} elements are taken at most"
        raise Refused(400, f"input {name!r}: shape {value} is too large: {most}.")
    return tuple(value)


def room(name: str, datatype: str, shape: tuple[int, ...]) -> int:
    """The bytes of such a tensor as an array.

    Raises:
        Refused: no such datatype.

    Example:
        >>> room("x", "FP32", (2, 3))
        24
    """
    if datatype not in DTYPES:
        raise Refused(400, f"input {name!r}: unknown datatype {datatype!r}.")
    return math.prod(shape) * np.dtype(DTYPES[datatype]).itemsize


def of_data(name: str, datatype: str, shape: tuple[int, ...], data: Any) -> np.ndarray:
    """An array from JSON: numbers in one flat list, or nested in the tensor's shape.

    Raises:
        Refused: another count or nesting, or elements that the datatype does not have.

    Example:
        >>> of_data("x", "INT8", (2, 1), [[1], [2]]).tolist()
        [[1], [2]]
        >>> of_data("x", "INT8", (2,), [1, 200])
        Traceback (most recent call last):
            ...
        paredown.ship.serve.refused.Refused: input 'x': expected INT8, got one out of its range.
    """
    flat = _flat(name, shape, data)
    if datatype == "BYTES":
        return _texts(name, shape, flat)
    dtype = np.dtype(DTYPES[datatype])
    kinds = set(map(type, flat))
    allowed = ALLOWED.get(dtype.kind, {int})
    if kinds - allowed:
        got = ", ".join(sorted(_kind(kind) for kind in kinds - allowed))
        raise Refused(400, f"input {name!r}: expected {datatype}, got {got} in 'data'.")
    out = f"input {name!r}: expected {datatype}, got one out of its range."
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=dtype)
    except OverflowError:
        raise Refused(400, out) from None
    if dtype.kind == "f" and not np.isfinite(array).all():  # JSON has only finite numbers
        raise Refused(400, out)
    return array.reshape(shape)


def _flat(name: str, shape: tuple[int, ...], data: Any) -> list[Any]:
    """The elements in order, where the nesting is the shape's or there is none."""
    if not isinstance(data, list):
        raise Refused(400, f"input {name!r}: expected 'data' to be a list.")
    count = math.prod(shape)
    if not data or not isinstance(data[0], list):
        if len(data) != count or list in set(map(type, data)):
            expected = f"{count} elements for shape {list(shape)}"
            raise Refused(400, f"input {name!r}: expected {expected}, got {len(data)}.")
        return data
    level = data
    for depth, size in enumerate(shape):
        if depth:
            if set(map(type, level)) - {list} or any(len(part) != size for part in level):
                raise _other_nesting(name, shape)
            level = [element for part in level for element in part]
        elif len(level) != size and count:
            raise _other_nesting(name, shape)
    if len(level) != count or list in set(map(type, level)):
        raise _other_nesting(name, shape)
    return level


def _other_nesting(name: str, shape: tuple[int, ...]) -> Refused:
    return Refused(400, f"input {name!r}: 'data' is not nested as its shape {list(shape)} says.")


def _kind(kind: type) -> str:
    words = {str: "texts", bool: "true or false", float: "fractions", int: "whole numbers"}
    return words.get(kind, "null" if kind is type(None) else "objects or lists")


def _texts(name: str, shape: tuple[int, ...], flat: list[Any]) -> np.ndarray:
    if set(map(type, flat)) - {str}:
        raise Refused(400, f"input {name!r}: expected BYTES, each element a text.")
    return _objects([text.encode() for text in flat], shape)


def _objects(parts: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(parts), dtype=object)
    array[:] = parts
    return array.reshape(shape)


def of_bytes(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> np.ndarray:
    """An array from raw bytes.

    Raises:
        Refused: another number of bytes than the shape has.

    Example:
        >>> of_bytes("x", "INT16", (2,), memoryview(bytes([1, 0, 2, 0]))).tolist()
        [1, 2]
    """
    if datatype == "BYTES":
        return _objects(_elements(name, math.prod(shape), raw), shape)
    wire = np.dtype("<u2") if datatype == "BF16" else np.dtype(DTYPES[datatype]).newbyteorder("<")
    expected = math.prod(shape) * wire.itemsize
    if expected != len(raw):
        what = f"{expected} bytes for shape {list(shape)} of {datatype}"
        raise Refused(400, f"input {name!r}: expected {what}, got {len(raw)}.")
    array = np.frombuffer(raw, dtype=wire).reshape(shape)
    if datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if datatype == "BOOL" and (array.view(np.uint8) > 1).any():
        raise Refused(400, f"input {name!r}: expected BOOL, each byte 0 or 1.")
    return array


def _elements(name: str, count: int, raw: memoryview) -> list[bytes]:
    found: list[bytes] = []
    place = 0
    while place < len(raw) and len(found) <= count:
        start = place + LENGTH.itemsize
        size = int.from_bytes(raw[place:start], "little") if start <= len(raw) else len(raw)
        place = start + size
        found.append(bytes(raw[start:place]))
    if place != len(raw) or len(found) != count:
        raise Refused(400, f"input {name!r}: expected {count} elements, each after its length.")
    return found


def to_bytes(array: np.ndarray) -> bytes:
    """The raw bytes of an array, as the protocol has them.

    Example:
        >>> to_bytes(np.array([1, 2], dtype=np.int16))
        b'\\x01\\x00\\x02\\x00'
    """
    if array.dtype == object:
        parts = ((len(each).to_bytes(4, "little"), each) for each in array.ravel())
        return b"".join(piece for pair in parts for piece in pair)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def to_data(array: np.ndarray) -> Any:
    """An array as flat JSON data: something that `orjson` writes.

    Texts that are no UTF-8 keep what can be read of them; NaN and infinity become null, for JSON
    has no such numbers.
    """
    if array.dtype == object:
        return [each.decode(errors="replace") for each in array.ravel()]
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    return np.ascontiguousarray(array).reshape(-1)
