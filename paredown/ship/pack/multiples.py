"""Vectors of float32, some of which are another one times a number.

A quantized layer's bias has the scales of its weights times that of its input, so half of a small
file's scales need not be stored. The number is found again from the two vectors; where a product
was rounded in another way, the last bits that differ are kept.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paredown.ship.pack import blocks
from paredown.ship.pack.blocks import Layout
from paredown.ship.pack.entropy import Damaged, deflate, inflate
from paredown.ship.pack.whole_numbers import Reader, number

STRANGE = -128  # an element that is no multiple, and kept as it is
MOST_STRANGE = 0.75  # of the elements of a vector that is still called a multiple
LEAST = 4  # elements of a vector that may be a multiple
LOOKED_AT = 64  # earlier vectors of the same length
_HEAD = struct.Struct("<III")  # bytes of the head, deflated and inflated, and of the kept vectors


@dataclass(frozen=True)
class Multiple:
    """A vector is ``by`` times the one ``back`` places before it among those of its length; its
    bits then lie ``off`` (n,) int8 further, and where that is STRANGE it is not a multiple."""

    back: int
    by: np.float32
    off: np.ndarray


def encode(data: np.ndarray, lengths: Sequence[int]) -> bytes:
    """Code vectors of so many float32 behind each other, (N,) uint8 in all.

    Example:
        >>> scales = np.linspace(0.1, 0.7, 9, dtype=np.float32)
        >>> data = np.concatenate([scales, scales * np.float32(0.3)]).view(np.uint8)
        >>> packed = encode(data, [9, 9])
        >>> len(packed) < 80, np.array_equal(decode(packed, 72), data)
        (True, True)
    """
    values = data.view("<f4")
    head, kept, earlier, at = bytearray(number(len(lengths))), [], _Earlier(), 0
    for length in lengths:
        vector = values[at : at + length]
        at += length
        found = earlier.multiple(vector)
        earlier.add(vector)
        head += number(length) + number(found.back if found else 0)
        if found:
            head += found.by.tobytes() + found.off.tobytes()
            kept.append(vector[found.off == STRANGE])
        else:
            kept.append(vector)
    rest = np.concatenate(kept).view(np.uint8)
    packed, coded = deflate(bytes(head)), blocks.encode(rest, Layout(4, 0, True))
    return _HEAD.pack(len(packed), len(head), len(rest)) + packed + coded


def decode(data: bytes, size: int) -> np.ndarray:
    """The (size,) uint8 that `encode` was given.

    Raises:
        Damaged: the data was not written for that size.
    """
    if len(data) < _HEAD.size:
        raise Damaged("cut off")
    packed, whole, kept = _HEAD.unpack_from(data)
    if whole > 16 * size + 64 or kept > size or kept % 4:
        raise Damaged("a head larger than it can be")
    head = Reader(inflate(data[_HEAD.size : _HEAD.size + packed], whole))
    rest = blocks.decode(data[_HEAD.size + packed :], kept).view("<f4")
    made, earlier, taken, left = [], _Earlier(), 0, size // 4
    for _ in range(head.count()):
        length, back = head.number(), head.number()
        if not 0 < length <= left:
            raise Damaged("vectors that do not fill the block")
        if back:
            by = np.frombuffer(head.bytes(4), "<f4")[0]
            off = np.frombuffer(head.bytes(length), np.int8)
            vector = _product(earlier.nth(length, back), by, off)
            strange = off == STRANGE
            count = int(strange.sum())
            if taken + count > len(rest):
                raise Damaged("fewer vectors than were said")
            vector[strange] = rest[taken : taken + count]
            taken += count
        else:
            vector = rest[taken : taken + length]
            taken += length
        if len(vector) != length:
            raise Damaged("fewer vectors than were said")
        earlier.add(vector)
        made.append(vector)
        left -= length
    head.finish()
    if left or taken != len(rest) or size % 4:
        raise Damaged("vectors that do not fill the block")
    return np.concatenate(made).view(np.uint8) if made else np.empty(0, np.uint8)


class _Earlier:
    """The vectors so far, by their length."""

    def __init__(self) -> None:
        self._known: dict[int, list[np.ndarray]] = {}

    def add(self, vector: np.ndarray) -> None:
        self._known.setdefault(len(vector), []).append(vector)

    def nth(self, length: int, back: int) -> np.ndarray:
        known = self._known.get(length, [])
        if back > len(known):
            raise Damaged("a multiple of nothing")
        return known[-back]

    def multiple(self, vector: np.ndarray) -> Multiple | None:
        """Of which earlier one it is a multiple, in most of its elements."""
        if len(vector) < LEAST:
            return None
        known = self._known.get(len(vector), [])[: -LOOKED_AT - 1 : -1]
        found = (_multiple(vector, each, back) for back, each in enumerate(known, 1))
        made = [each for each in found if each]
        return min(made, key=lambda each: int((each.off == STRANGE).sum()), default=None)


def _multiple(vector: np.ndarray, known: np.ndarray, back: int) -> Multiple | None:
    with np.errstate(all="ignore"):
        ratios = (vector / known).astype("<f4")
        rounded = ratios.view("<i4") >> 3
        values, counts = np.unique(rounded, return_counts=True)
        if counts.max() < max(2, 0.1 * len(vector)):
            return None
        near = np.float32(np.median(ratios[rounded == values[counts.argmax()]]))
        if not np.isfinite(near):
            return None
        bys = [near, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf))]
        offs = [_off(vector, known, by) for by in bys]
    best = min(range(3), key=lambda n: int(np.abs(offs[n]).clip(0, 1000).sum()))
    off = np.where(np.abs(offs[best]) > 127, STRANGE, offs[best]).astype(np.int8)
    if (off == STRANGE).sum() > MOST_STRANGE * len(off):
        return None
    return Multiple(back, bys[best], off)


def _off(vector: np.ndarray, known: np.ndarray, by: np.float32) -> np.ndarray:
    made = (known * by).astype("<f4")
    return vector.view("<i4").astype(np.int64) - made.view("<i4")


def _product(known: np.ndarray, by: np.float32, off: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        made = (known * by).astype("<f4").view("<i4").astype(np.int64) + off
    return made.astype("<i4").view("<f4")
