"""An ONNX file as it lies on disk: its protocol buffer, read field by field, and nothing else.

It is foreign data: nothing is believed of it that was not looked at, and no message is copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_DEPTH = 64  # of graphs within graphs


@dataclass(frozen=True)
class Outside:
    """Where a tensor's bytes lie outside the file: in which one, as it is named, and what of it."""

    location: str
    offset: int
    length: int | None  # None is all the rest


def outside(path: Path) -> list[Outside]:
    """The tensors that an ONNX file keeps in others.

    Raises:
        ValueError: it is no ONNX file, or a damaged one; says what is wrong.
        OSError: it cannot be read.
    """
    if not path.stat().st_size:
        raise ValueError("an empty file")
    view = memoryview(np.memmap(path, np.uint8, "r").data)
    found: dict[Outside, None] = {}
    try:
        for start, end in tensor_protos(view):
            entries = {}
            for number, a, b in fields(view, start, end):
                if number == 13:  # TensorProto.external_data
                    entry = {n: bytes(view[c:d]) for n, c, d in fields(view, a, b)}
                    entries[entry.get(1, b"")] = entry.get(2, b"").decode()
            if entries:
                length = entries.get(b"length")
                whole = None if length is None else int(length)
                offset = int(entries.get(b"offset", 0))
                found[Outside(entries.get(b"location", ""), offset, whole)] = None
    except IndexError as error:
        raise ValueError("a file that is cut off") from error
    return list(found)


def tensor_protos(view: memoryview) -> Iterator[tuple[int, int]]:
    """Where the tensors of an ONNX file are told: in its graphs' initializers and attributes.

    Raises:
        ValueError: it is no such file, or graphs lie deeper in each other than any runtime reads.
        IndexError: it is cut off.
    """
    for number, start, end in fields(view, 0, len(view)):
        if number == 7:  # ModelProto.graph
            yield from _graph(view, start, end, 0)
        elif number == 20:  # ModelProto.training_info
            for field, a, b in fields(view, start, end):
                if field in (1, 2):  # its two graphs
                    yield from _graph(view, a, b, 0)
        elif number == 25:  # ModelProto.functions
            for field, a, b in fields(view, start, end):
                if field == 7:  # FunctionProto.node
                    yield from _node(view, a, b, 0)


def _graph(view: memoryview, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    if depth > MAX_DEPTH:
        raise ValueError(f"graphs that lie more than {MAX_DEPTH} deep in each other")
    for number, a, b in fields(view, start, end):
        if number == 5:  # GraphProto.initializer
            yield a, b
        elif number == 15:  # GraphProto.sparse_initializer
            yield from _sparse(view, a, b)
        elif number == 1:  # GraphProto.node
            yield from _node(view, a, b, depth)


def _sparse(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The values and indices of a SparseTensorProto."""
    for number, a, b in fields(view, start, end):
        if number in (1, 2):
            yield a, b


def _node(view: memoryview, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    for field, a, b in fields(view, start, end):
        if field == 5:  # NodeProto.attribute
            yield from _attribute(view, a, b, depth)


def _attribute(view: memoryview, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
    for number, a, b in fields(view, start, end):
        if number in (5, 10):  # AttributeProto.t and tensors
            yield a, b
        elif number in (22, 23):  # AttributeProto.sparse_tensor and sparse_tensors
            yield from _sparse(view, a, b)
        elif number in (6, 11):  # AttributeProto.g and graphs
            yield from _graph(view, a, b, depth + 1)


def fields(view: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of a message's fields; a number's start is where it stands, and
    its end the same."""
    at = start
    while at < end:
        key, at = varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, at, at
            _, at = varint(view, at)
        elif kind == 2:
            length, at = varint(view, at)
            if at + length > end:
                raise ValueError("a field beyond its message")
            yield number, at, at + length
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError("not a protocol buffer")


def varint(view: memoryview, at: int) -> tuple[int, int]:
    """The number that stands at a place, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without an end")


def varints(view: memoryview, start: int, end: int) -> list[int]:
    """The numbers that fill a stretch."""
    found, at = [], start
    while at < end:
        value, at = varint(view, at)
        found.append(value)
    return found
