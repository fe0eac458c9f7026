"""A stream's chunk -> its bytes: quantized tensors by their neighbours, scales by each other, all
else as one block."""

from __future__ import annotations

import struct
from math import prod

import numpy as np

from paredown.ship.pack import blocks, multiples, weights
from paredown.ship.pack.blocks import WORTH, Layout
from paredown.ship.pack.entropy import Damaged
from paredown.ship.pack.neighbours import How
from paredown.ship.pack.whole_numbers import Reader, number

TENSORS, VECTORS = 255, 254  # first bytes that no block has
NAMES = {TENSORS: "neighbours", VECTORS: "multiples"}
SMALL = 4096  # bytes below which a tensor learns from the others, whatever it is
_HEAD = struct.Struct("<BI")


def encode(data: np.ndarray, layout: Layout) -> bytes:
    """The shortest coding of a chunk (N,) of bytes; its first byte says which it is.

    Example:
        >>> chunk = np.arange(4000).astype(np.uint8)
        >>> packed = encode(chunk, Layout(shapes=((100, 40),)))
        >>> np.array_equal(decode(packed, 4000), chunk)
        True
    """
    if not layout.shapes:
        return blocks.encode(data, layout)
    if layout.floats:
        lengths = [prod(shape) for shape in layout.shapes]
        coded = bytes([VECTORS]) + multiples.encode(data, lengths)
        return min(coded, blocks.encode(data, Layout(4, 0, True)), key=len)
    coded = _tensors(data, layout.shapes)
    if len(blocks.quick(data)) < WORTH * len(coded) or len(coded) >= len(data):
        coded = min(coded, blocks.encode(data, Layout()), key=len)
    return coded


def _tensors(data: np.ndarray, shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """Tensors behind each other: by their neighbours, or where it is shorter as blocks."""
    head, hows, together, alone, at = bytearray(number(len(shapes))), [], [], [], 0
    for shape in shapes:
        tensor = data[at : at + prod(shape)]
        at += len(tensor)
        how, block = _better(tensor, shape)
        head += number(len(tensor)) + number(len(block))
        if block:
            alone.append(block)
        else:
            hows.append(how)
            together.append(tensor)
    coded = weights.encode(np.concatenate(together), hows) if hows else b""
    return b"".join([_HEAD.pack(TENSORS, len(head)), head, *alone, coded])


def _better(tensor: np.ndarray, shape: tuple[int, ...]) -> tuple[How, bytes]:
    """The way through a tensor, and its block where that is shorter."""
    how, bits = weights.chosen(tensor, shape)
    if len(tensor) < SMALL:
        return how, b""
    columns = prod(shape[1:]) if len(shape) > 1 and shape[0] > 1 else 0
    block = blocks.encode(tensor, Layout(1, columns))
    return how, block if 8 * len(block) < WORTH * bits else b""


def decode(data: bytes, size: int) -> np.ndarray:
    """The chunk of so many bytes, (size,) uint8.

    Raises:
        Damaged: the data is not what `encode` wrote for a chunk of that size.
    """
    if data[:1] == bytes([VECTORS]):
        return multiples.decode(data[1:], size)
    if data[:1] != bytes([TENSORS]):
        return blocks.decode(data, size)
    return _decode_tensors(data, size)


def _decode_tensors(data: bytes, size: int) -> np.ndarray:
    if len(data) < _HEAD.size:
        raise Damaged("cut off")
    head_bytes = _HEAD.unpack_from(data)[1]
    head = Reader(data[_HEAD.size : _HEAD.size + head_bytes])
    tensors = [(head.number(), head.number()) for _ in range(head.count())]
    head.finish()
    together = sum(length for length, block in tensors if not block)
    if sum(length for length, _ in tensors) != size or not tensors:
        raise Damaged("tensors that do not fill the block")
    at = _HEAD.size + head_bytes
    ends = at + sum(block for _, block in tensors)
    rest = weights.decode(data[ends:], together) if together else np.empty(0, np.uint8)
    if ends > len(data) or (not together and ends != len(data)):
        raise Damaged("another length than was said")
    made, taken = [], 0
    for length, block in tensors:
        if block:
            made.append(blocks.decode(data[at : at + block], length))
            at += block
        else:
            made.append(rest[taken : taken + length])
            taken += length
    return np.concatenate(made)


def coding(first: bytes) -> str:
    """The name of a chunk's coding, by its first byte."""
    return NAMES.get(first[0] if first else 0) or blocks.coding(first)
