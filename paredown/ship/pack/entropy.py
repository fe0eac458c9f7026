"""Symbols of a small alphabet -> about as many bits as their entropy, and back.

An asymmetric numeral system (Duda 1311.2540), by constriction (Bamler 2201.01741), with the
symbols' own frequencies. Rows that spread alike share a table: what the channels of a weight
tensor differ in is mostly their spread.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

MAX_ALPHABET = 4096
CLASSES = (1, 4, 16)  # numbers of tables that are tried
SAMPLE = 1 << 16
_CHUNK = 1 << 16  # symbols in a histogram's working set, so that it stays in the cache
_HEAD = struct.Struct("<BHII")  # classes, alphabet, bytes of tables, bytes of rows
_TABLE_BITS = 6.0  # of an entry, about, once deflated


class Damaged(ValueError):
    """Packed data that is not what packing writes."""


@dataclass(frozen=True)
class Plan:
    """How a block of symbols would be coded, and how many bits that takes.

    ``classes`` (rows,) is the table of each row; ``counts`` (tables, alphabet).
    """

    classes: np.ndarray
    counts: np.ndarray
    bits: float


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of all symbols counted, at the entropy of their frequencies; sums over tables.

    Example:
        >>> entropy_bits(np.array([2, 2])), entropy_bits(np.array([[4, 0], [1, 1]]))
        (4.0, 2.0)
    """
    counts = np.atleast_2d(counts).astype(np.float64)
    totals = counts.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, counts * np.log2(totals / counts), 0.0)
    return float(bits.sum())


def plan(symbols: np.ndarray, alphabet: int) -> Plan:
    """The cheapest of a few ways to share tables between the rows of (rows, columns) symbols."""
    rows = len(symbols)
    most = max(k for k in CLASSES if k == 1 or k * 4 <= rows)
    ranks = _ranks(symbols, most, alphabet)
    counts = _histograms(symbols, ranks, most, alphabet)
    plans = []
    for tables in (k for k in CLASSES if k <= most):
        merged = counts.reshape(tables, most // tables, alphabet).sum(1)
        present = int((merged > 0).sum())
        bits = entropy_bits(merged) + _TABLE_BITS * present
        bits += rows * np.log2(tables) if tables > 1 else 0.0
        plans.append(Plan((ranks // (most // tables)).astype(np.uint8), merged, bits))
    return min(plans, key=lambda each: each.bits)


def sample(symbols: np.ndarray) -> np.ndarray:
    """Evenly strided rows and columns, about 65,536 symbols: enough to choose a plan by."""
    rows, columns = symbols.shape
    step = max(1.0, (symbols.size / SAMPLE) ** 0.5)
    across = max(1, round(min(step, columns / 16)))
    return symbols[:: max(1, round(symbols.size / SAMPLE / across)), ::across]


def _ranks(symbols: np.ndarray, classes: int, alphabet: int) -> np.ndarray:
    """Rows (rows,) in so many classes of equal size, from those that spread least.

    Distances are counted around the circle of symbols, where -1 of a signed byte lies beside 0.
    """
    if classes == 1:
        return np.zeros(len(symbols), np.uint8)
    sample = symbols[:, :: max(1, symbols.shape[1] // 256)].astype(np.int32)
    commonest = int(np.bincount(sample.reshape(-1), minlength=alphabet).argmax())
    apart = np.abs(sample - commonest)
    spread = np.minimum(apart, alphabet - apart).mean(1)
    order = np.argsort(spread, kind="stable")
    ranks = np.empty(len(symbols), np.uint8)
    ranks[order] = np.arange(len(symbols)) * classes // len(symbols)
    return ranks


def _histograms(symbols: np.ndarray, ranks: np.ndarray, classes: int, alphabet: int) -> np.ndarray:
    """Counts (classes, alphabet) of the rows of each class."""
    counts = np.zeros(classes * alphabet, np.int64)
    step = max(1, _CHUNK // max(1, symbols.shape[1]))
    for first in range(0, len(symbols), step):
        part = symbols[first : first + step].astype(np.int64)
        part += ranks[first : first + step, None].astype(np.int64) * alphabet
        counts += np.bincount(part.reshape(-1), minlength=len(counts))
    return counts.reshape(classes, alphabet)


def encode(symbols: np.ndarray, how: Plan) -> bytes:
    """Code (rows, columns) symbols below the alphabet of the plan.

    Example:
        >>> symbols = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
        >>> data = encode(symbols, plan(symbols, 3))
        >>> np.array_equal(decode(data, 3, 4), symbols)
        True
    """
    import constriction

    codes = _codes(how.counts)
    coder = constriction.stream.stack.AnsCoder()
    for table in reversed(range(len(codes))):
        rows = symbols[how.classes == table]
        if rows.size and np.count_nonzero(codes[table]) > 1:
            coder.encode_reverse(_dense(rows, codes[table]), _model(codes[table]))
    tables = deflate(codes.tobytes())
    classes = deflate(how.classes.tobytes()) if len(codes) > 1 else b""
    head = _HEAD.pack(len(codes), codes.shape[1], len(tables), len(classes))
    return head + tables + classes + coder.get_compressed().astype("<u4").tobytes()


def decode(data: bytes, rows: int, columns: int) -> np.ndarray:
    """What `encode` was given, as uint8 or, above 256 symbols, uint16.

    Raises:
        Damaged: the data was not written for that shape.
    """
    import constriction

    codes, classes, words = _parts(data, rows)
    kind = np.uint8 if codes.shape[1] <= 256 else np.uint16
    made = np.empty((rows, columns), kind)
    coder = constriction.stream.stack.AnsCoder(words)
    for table in range(len(codes)):
        chosen = np.flatnonzero(classes == table)
        present = np.flatnonzero(codes[table]).astype(kind)
        count = len(chosen) * columns
        if not count:
            continue
        if len(present) == 0:
            raise Damaged("a table without symbols")
        if len(present) == 1:
            made[chosen] = present[0]
        else:
            dense = coder.decode(_model(codes[table]), count)
            values = present[dense].reshape(len(chosen), columns)
            if len(chosen) == rows:
                made = values
            else:
                made[chosen] = values
    if not coder.is_empty():
        raise Damaged("symbols are left over")
    return made


def _parts(data: bytes, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables (tables, alphabet), the table of each row, and the coded words."""
    if len(data) < _HEAD.size:
        raise Damaged("cut off")
    tables, alphabet, table_bytes, row_bytes = _HEAD.unpack_from(data)
    rest = data[_HEAD.size :]
    if tables not in CLASSES or not 0 < alphabet <= MAX_ALPHABET:
        raise Damaged("a count of tables or symbols that cannot be")
    codes = inflate(rest[:table_bytes], tables * alphabet)
    if tables > 1:
        classes = inflate(rest[table_bytes : table_bytes + row_bytes], rows)
    else:
        classes = bytes(rows)
    words = rest[table_bytes + row_bytes :]
    if len(words) % 4:
        raise Damaged("half a word")
    found = np.frombuffer(words, "<u4").astype(np.uint32)
    if len(found) and found[-1] == 0:
        raise Damaged("an empty last word")
    return (
        np.frombuffer(codes, np.uint8).reshape(tables, alphabet),
        np.frombuffer(classes, np.uint8),
        found,
    )


def deflate(data: bytes) -> bytes:
    """A bare deflate stream: what is small enough that a head of its own would tell."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(data) + packer.flush()


def inflate(data: bytes, size: int) -> bytes:
    """Exactly so many bytes out of a bare deflate stream, and never more in memory.

    Raises:
        Damaged: it holds something else.
    """
    unpacker = zlib.decompressobj(wbits=-15)
    try:
        made = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise Damaged(str(error)) from error
    if len(made) != size or not unpacker.eof:
        raise Damaged("another length than was said")
    return made


def _dense(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Symbols numbered anew among those that occur."""
    numbers = np.cumsum(codes > 0, dtype=np.int32) - 1
    return numbers[rows.reshape(-1)]


def _codes(counts: np.ndarray) -> np.ndarray:
    """Counts as bytes: 0 for none, else 1 + 8 log2(count); that costs under 0.001 bits a symbol."""
    with np.errstate(divide="ignore"):
        logs = np.where(counts > 0, 1 + np.rint(8 * np.log2(np.maximum(counts, 1))), 0)
    return np.minimum(logs, 255).astype(np.uint8)


# 2 ** (code / 8) in whole numbers, so that every machine has the same frequencies
_WEIGHTS = np.rint(2.0 ** (np.arange(255) / 8) * 1024)


def _model(codes: np.ndarray):  # type: ignore[no-untyped-def]
    import constriction

    present = codes[codes > 0].astype(np.int64)
    weights = _WEIGHTS[present - 1]
    return constriction.stream.model.Categorical(
        (weights / weights.sum()).astype(np.float32), perfect=False
    )
