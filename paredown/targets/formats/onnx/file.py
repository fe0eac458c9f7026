"""An ONNX file that is written as its weights are read: nowhere does it lie in memory whole.

The file is protobuf: a model (field 7: the graph), in which each initializer (field 5 of the graph)
is a message of its own that ends with its numbers (field 9).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor

from paredown.graph import lazily

GRAPH, INITIALIZER, NUMBERS = 7, 5, 9  # fields
VARINT, BYTES, WIDTHS = 0, 2, {1: 8, 5: 4}  # kinds of fields, and the bytes that others take


@dataclass(frozen=True)
class File:
    """An ONNX file; to go through it gives its bytes in parts, the same each time.

    Attributes:
        proto: all of it but the numbers of initializers.
        numbers: those, by the initializer's name.
    """

    proto: onnx.ModelProto
    numbers: dict[str, ir.TensorProtocol | bytes]

    @staticmethod
    def of(model: ir.Model) -> File:
        """The file of a graph, whose tensors stay where they are."""
        graph = model.graph
        held = {
            name: value.const_value
            for name, value in graph.initializers.items()
            if value.const_value is not None and value.const_value.dtype is not ir.DataType.STRING
        }
        for name, tensor in held.items():
            shape = ir.Shape(tensor.shape.numpy())
            outside = ir.ExternalTensor("", 0, 0, tensor.dtype, shape=shape, name=name)
            graph.initializers[name].const_value = outside
        proto = ir.to_proto(model)
        for name, tensor in held.items():
            graph.initializers[name].const_value = tensor
        for each in proto.graph.initializer:
            each.ClearField("external_data")
            each.ClearField("data_location")
        return File(proto, dict(held))

    @staticmethod
    def read(encoded: bytes) -> File:
        """The file that these bytes are."""
        proto, numbers = onnx.load_from_string(encoded), {}
        for tensor in proto.graph.initializer:
            if tensor.HasField("raw_data"):
                numbers[tensor.name] = tensor.raw_data
                tensor.ClearField("raw_data")
        return File(proto, dict(numbers))

    def __iter__(self) -> Iterator[bytes | memoryview]:
        before, after = _around(self.proto, GRAPH)
        first, last = _around(self.proto.graph, INITIALIZER)
        heads = [self._head(tensor) for tensor in self.proto.graph.initializer]
        sizes = [
            len(head) + self._size(t.name)
            for head, t in zip(heads, self.proto.graph.initializer, strict=True)
        ]
        yield before + _field(GRAPH, len(first) + sum(sizes) + len(last)) + first
        for head, tensor in zip(heads, self.proto.graph.initializer, strict=True):
            yield head
            yield from self.parts(tensor.name)
        yield last + after

    def __bytes__(self) -> bytes:
        return b"".join(self)

    def check(self) -> None:
        """Assert that the file is as ONNX wants it; the numbers are not looked at.

        Raises:
            onnx.checker.ValidationError: says what is wrong.
        """
        shown = onnx.ModelProto()
        shown.CopyFrom(self.proto)
        del shown.graph.initializer[:]
        for tensor in self.proto.graph.initializer:
            if tensor.name not in self.numbers:
                shown.graph.initializer.append(tensor)
                continue
            described = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            shown.graph.input.append(described)
        onnx.checker.check_model(shown)

    @property
    def size_bytes(self) -> int:
        """How long the file is."""
        numbers = sum(map(self._size, self.numbers))
        return self.proto.ByteSize() + numbers

    def parts(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of an initializer's numbers, in parts; none where they stand in the proto."""
        held: Any = self.numbers.get(name, b"")
        raw = getattr(held, "raw", None)
        if isinstance(raw, Tensor):
            yield from lazily.parts(raw)
        else:
            yield held if isinstance(held, bytes) else held.tobytes()

    def _size(self, name: str) -> int:
        held = self.numbers.get(name, b"")
        return len(held) if isinstance(held, bytes) else held.nbytes

    def _head(self, tensor: onnx.TensorProto) -> bytes:
        """What comes before an initializer's numbers."""
        if tensor.name not in self.numbers:
            whole = tensor.SerializeToString(deterministic=True)
            return _field(INITIALIZER, len(whole)) + whole
        told, rest = _around(tensor, NUMBERS)
        assert not rest
        size = self._size(tensor.name)
        told += _field(NUMBERS, size)
        return _field(INITIALIZER, len(told) + size) + told


def without_numbers(path: Path) -> onnx.ModelProto:
    """What an ONNX file holds besides the numbers of its initializers, which are not read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        made = b"".join(_bare(data, 0, len(data), (GRAPH, INITIALIZER)))
    return onnx.load_from_string(made)


def _bare(data: mmap.mmap, start: int, end: int, within: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of a message but for the numbers of the initializers in it, which are messages
    ``within`` those fields."""
    while start < end:
        key, at = _varint(data, start)
        number, kind = key >> 3, key & 7
        if kind != BYTES:
            after = _varint(data, at)[1] if kind == VARINT else at + WIDTHS[kind]
            yield data[start:after]
        else:
            size, at = _varint(data, at)
            after = at + size
            if within[:1] == (number,):
                inner = b"".join(_bare(data, at, after, within[1:]))
                yield _field(number, len(inner)) + inner
            elif within or number != NUMBERS:
                yield data[start:after]
        start = after


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def _around(message: Any, number: int) -> tuple[bytes, bytes]:
    """The fields of a message before that number, and those behind it."""
    made = []
    for keep in (lambda n: n < number, lambda n: n > number):
        part = type(message)()
        part.CopyFrom(message)
        for field in message.DESCRIPTOR.fields:
            if not keep(field.number):
                part.ClearField(field.name)
        made.append(part.SerializeToString(deterministic=True))
    return made[0], made[1]


def _field(number: int, size: int) -> bytes:
    """The bytes before a field of so many bytes.

    Example:
        >>> _field(7, 300)
        b':\\xac\\x02'
    """
    made = bytearray([number << 3 | 2])
    while size > 127:
        made.append(size & 127 | 128)
        size >>= 7
    return bytes([*made, size])
