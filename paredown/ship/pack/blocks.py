"""One block of bytes -> the shortest of its codings, and back.

A coding is chosen by what compression left in the block: pruned weights are zeros in a pattern and
the rest, shared weights are few distinct values, quantized weights are symbols, and of floats only
sign and exponent are worth coding. Each coding breaks the block into parts that are coded in turn.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from paredown.ship.pack import entropy
from paredown.ship.pack.entropy import Damaged, Plan, entropy_bits

RAW, ZSTD, XZ, XZ_TEXT, SYMBOLS, PALETTE, ZEROS, PLANES = range(8)
NAMES = ("stored", "zstd", "xz", "xz", "symbols", "few values", "zeros apart", "byte planes")
LEVEL = 19  # of zstandard, where it is used
QUICK_LEVEL = 1  # to see whether repeats pay
XZ_MOST = 1 << 22  # bytes above which xz is too slow
XZ_SAMPLE = 1 << 14  # bytes by which one of its settings is chosen
MAX_VALUES = 2048  # distinct ones that are worth a palette
GROUP = 4  # neighbours whose zeros are coded together: finds 2:4 and coarser patterns
WORTH = 0.985  # a coding is taken above its simpler rival from this share of its bits down
DEPTH = 6  # codings within codings at most
TEXT, BINARY = {"lc": 4, "pb": 0}, {"lc": 3, "pb": 2}  # of xz: letters follow letters


@dataclass(frozen=True)
class Layout:
    """How a block of bytes reads: elements of ``width`` bytes, ``columns`` in a row.

    ``floats`` says whether the elements are floating-point numbers. ``shapes`` are those of
    quantized tensors behind each other, which the coder alone needs to know.
    """

    width: int = 1
    columns: int = 0  # 0: no rows
    floats: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()


# --- coding ----------------------------------------------------------------------------------


def encode(data: np.ndarray, layout: Layout) -> bytes:
    """The shortest coding of a block (N,) of bytes; its first byte says which it is.

    Example:
        >>> block = np.zeros(4000, np.uint8)
        >>> packed = encode(block, Layout(width=4, columns=10))
        >>> len(packed) < 40, np.array_equal(decode(packed, 4000), block)
        (True, True)
    """
    whole = len(data) // layout.width * layout.width
    if whole < len(data) or len(data) < 64:
        return repeats(data)
    elements = data.view(f"<u{layout.width}") if layout.width > 1 else data
    coded = _coded(elements, layout)
    if len(quick(data)) < WORTH * len(coded):
        coded = min(coded, repeats(data), key=len)
    return coded if len(coded) <= len(data) else _tagged(RAW, data.tobytes())


def quick(data: np.ndarray) -> bytes:
    """What finds repeats in a hurry, to see whether they pay."""
    return _zstd(data, QUICK_LEVEL)


def _coded(elements: np.ndarray, layout: Layout) -> bytes:
    """Elements (N,) by the statistics of their values alone."""
    values = _palette(elements)
    if values is not None:
        return _few(elements, values, layout)
    zeros = float(np.count_nonzero(elements == 0)) / len(elements)
    if zeros > 0.02:
        return _zeros_apart(elements, layout)
    return _planes(elements, layout)


def _few(elements: np.ndarray, values: np.ndarray, layout: Layout) -> bytes:
    """Numbers of the distinct values; the zeros apart where they lie in a pattern."""
    symbols = _numbers(values, elements)
    columns = layout.columns or len(elements)
    how, turned = _planned(symbols, columns, len(values))
    if values[0] == 0 and len(values) > 2 and layout.columns:
        zero = elements == 0
        apart = min(_pattern_bits(zero, columns, down) for down in (False, True))
        rest = entropy_bits(how.counts[:, 1:].sum(0))
        if apart + rest < WORTH * how.bits:
            return _zeros_apart(elements, layout)
    table = _zstd(values.astype(f"<u{layout.width}").tobytes(), LEVEL)
    head = struct.pack(
        "<BBHIII?", PALETTE, layout.width, len(values), len(table), len(elements), columns, turned
    )
    shaped = symbols.reshape(-1, columns)
    return head + table + entropy.encode(np.ascontiguousarray(shaped.T) if turned else shaped, how)


def _planned(symbols: np.ndarray, columns: int, alphabet: int) -> tuple[Plan, bool]:
    """The cheaper plan of rows or columns sharing tables, and whether it is of columns."""
    shaped = symbols.reshape(-1, columns)
    few = entropy.sample(shaped)
    turned = (
        len(few) >= 4
        and few.shape[1] >= 4
        and (entropy.plan(few.T, alphabet).bits < WORTH * entropy.plan(few, alphabet).bits)
    )
    return entropy.plan(np.ascontiguousarray(shaped.T) if turned else shaped, alphabet), turned


def _palette(elements: np.ndarray) -> np.ndarray | None:
    """The distinct values, sorted; None where there are clearly too many."""
    if elements.dtype.itemsize <= 2:
        found = np.flatnonzero(np.bincount(elements)).astype(elements.dtype)
        return found if len(found) <= MAX_VALUES else None
    values = np.unique(elements[:: max(1, len(elements) // 8192)])
    while len(values) <= MAX_VALUES:
        at = np.searchsorted(values, elements)
        strange = elements[values[np.minimum(at, len(values) - 1)] != elements]
        if not len(strange):
            return values
        values = np.union1d(values, strange[: 1 << 16])
    return None


def _numbers(values: np.ndarray, elements: np.ndarray) -> np.ndarray:
    """The place of each element among the sorted distinct values."""
    kind = np.uint8 if len(values) <= 256 else np.uint16
    if elements.dtype.itemsize > 2:
        return np.searchsorted(values, elements).astype(kind)
    table = np.zeros(int(values[-1]) + 1, kind)
    table[values] = np.arange(len(values))
    return table[elements]


def _zeros_apart(elements: np.ndarray, layout: Layout) -> bytes:
    """Which are zero, a few neighbours at a time, and the others behind that."""
    columns = layout.columns or len(elements)
    zero = elements == 0
    down = _pattern_bits(zero, columns, down=True) < WORTH * _pattern_bits(zero, columns)
    mask = _grouped(zero, columns, down)
    pattern = entropy.encode(mask, entropy.plan(mask, 1 << GROUP))
    kept = np.ascontiguousarray(elements[~zero])
    rest = _coded_or_raw(kept, Layout(layout.width, 0, layout.floats))
    head = struct.pack("<BBIII?", ZEROS, layout.width, len(elements), columns, len(pattern), down)
    return head + pattern + rest


def _grouped(zero: np.ndarray, columns: int, down: bool) -> np.ndarray:
    """Flags (N,) as numbers of GROUP neighbours in a row (or column), (1, N / GROUP)."""
    flags = zero.reshape(-1, columns)
    ordered = np.ascontiguousarray(flags.T if down else flags).reshape(-1)
    padded = np.concatenate([ordered, np.zeros(-len(ordered) % GROUP, bool)])
    weights = (1 << np.arange(GROUP)).astype(np.uint8)
    return (padded.reshape(-1, GROUP) @ weights).astype(np.uint8)[None]


def _pattern_bits(zero: np.ndarray, columns: int, down: bool = False) -> float:
    return entropy_bits(np.bincount(_grouped(zero, columns, down)[0], minlength=1 << GROUP))


def _planes(elements: np.ndarray, layout: Layout) -> bytes:
    """Bytes of equal significance together; of floats the sign goes last, to bare the exponent."""
    width = layout.width
    turned = elements
    if layout.floats and width > 1:
        bits = np.array(8 * width - 1, elements.dtype)
        turned = (elements << np.array(1, elements.dtype)) | (elements >> bits)
    planes = np.ascontiguousarray(turned.view(np.uint8).reshape(-1, width).T)
    parts = [_plane(plane, layout.columns) for plane in planes]
    lengths = struct.pack(f"<{width}I", *map(len, parts))
    head = struct.pack("<BBI?", PLANES, width, len(elements), layout.floats)
    return head + lengths + b"".join(parts)


def _plane(plane: np.ndarray, columns: int) -> bytes:
    columns = columns or len(plane)
    shaped = plane.reshape(-1, columns)
    counts = np.bincount(plane, minlength=256)
    if entropy_bits(counts) > 7.97 * len(plane):
        return _tagged(RAW, plane.tobytes())
    how, turned = _planned(plane, columns, 256)
    head = struct.pack("<BII?", SYMBOLS, len(plane), columns, turned)
    coded = head + entropy.encode(np.ascontiguousarray(shaped.T) if turned else shaped, how)
    return coded if len(coded) < len(plane) else _tagged(RAW, plane.tobytes())


def _coded_or_raw(elements: np.ndarray, layout: Layout) -> bytes:
    if not len(elements):
        return _tagged(RAW, b"")
    values = _palette(elements)
    few = values is not None and len(values) <= MAX_VALUES
    coded = (
        _few(elements, values, layout) if few and values is not None else _planes(elements, layout)
    )
    return min(coded, _tagged(RAW, elements.tobytes()), key=len)


def repeats(data: np.ndarray) -> bytes:
    """The shortest of what finds repeated strings of bytes; never longer than zstandard or xz."""
    raw = data.tobytes()
    packed = [_tagged(RAW, raw), _tagged(ZSTD, _zstd(data, LEVEL))]
    if len(raw) <= XZ_MOST:
        tags = {XZ, XZ_TEXT}
        if len(raw) > 2 * XZ_SAMPLE:  # a part tells whether the other is better
            part = raw[len(raw) // 2 :][:XZ_SAMPLE]
            tags = {XZ, min((XZ, XZ_TEXT), key=lambda tag: len(_xz(part, tag)))}
        packed += [_xz(raw, tag) for tag in sorted(tags)]
    return min(packed, key=len)


def _xz(raw: bytes, tag: int) -> bytes:
    return _tagged(tag, lzma.compress(raw, lzma.FORMAT_RAW, filters=_filters(tag, len(raw))))


def _filters(tag: int, size: int) -> list[dict[str, Any]]:
    """LZMA2 for a block of so many bytes, with no more memory than that needs."""
    window = max(1 << 12, 1 << (size - 1).bit_length()) if size else 1 << 12
    chosen = TEXT if tag == XZ_TEXT else BINARY
    preset = 9 | lzma.PRESET_EXTREME
    return [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window, **chosen}]


def _zstd(data: np.ndarray | bytes, level: int) -> bytes:
    raw = data if isinstance(data, bytes) else data.tobytes()
    settings = zstandard.ZstdCompressor(
        level=level, write_checksum=False, write_content_size=False, write_dict_id=False
    )
    return settings.compress(raw)


def _tagged(tag: int, data: bytes) -> bytes:
    return bytes([tag]) + data


# --- decoding --------------------------------------------------------------------------------


def decode(data: bytes, size: int, depth: int = 0) -> np.ndarray:
    """The block of so many bytes, (size,) uint8.

    Raises:
        Damaged: the data is not what `encode` wrote for a block of that size.
    """
    if not data or depth > DEPTH:
        raise Damaged("an empty or endless coding")
    tag, rest = data[0], data[1:]
    if tag not in _DECODERS:
        raise Damaged(f"coding {tag} is not known")
    try:
        made = _DECODERS[tag](rest, size, depth)
    except struct.error as error:
        raise Damaged("cut off") from error
    if made.nbytes != size:
        raise Damaged("another size than was said")
    return made.reshape(-1).view(np.uint8)


def coding(data: bytes) -> str:
    """The name of a coded block's coding."""
    return NAMES[data[0]] if data and data[0] < len(NAMES) else "unknown"


def _decode_raw(data: bytes, size: int, depth: int) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _decode_zstd(data: bytes, size: int, depth: int) -> np.ndarray:
    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    try:
        made = unpacker.decompress(data, max_output_size=size + 1)
    except zstandard.ZstdError as error:
        raise Damaged(str(error)) from error
    return np.frombuffer(made, np.uint8)


def _decode_xz(data: bytes, size: int, depth: int) -> np.ndarray:
    return _inflated(data, _filters(XZ, size), size)


def _decode_xz_text(data: bytes, size: int, depth: int) -> np.ndarray:
    return _inflated(data, _filters(XZ_TEXT, size), size)


def _inflated(data: bytes, filters: list[dict[str, Any]], size: int) -> np.ndarray:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
    try:
        made = unpacker.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise Damaged(str(error)) from error
    return np.frombuffer(made, np.uint8)


def _decode_symbols(data: bytes, size: int, depth: int) -> np.ndarray:
    head = struct.Struct("<II?")
    count, columns, turned = head.unpack_from(data)
    return _shaped(data[head.size :], count, columns, turned, size)


def _decode_palette(data: bytes, size: int, depth: int) -> np.ndarray:
    head = struct.Struct("<BHIII?")
    width, values, table_bytes, count, columns, turned = head.unpack_from(data)
    kind = _kind(width)
    if not 0 < values <= MAX_VALUES or count * width != size:
        raise Damaged("a count of values that cannot be")
    rest = data[head.size :]
    table = _decode_zstd(rest[:table_bytes], values * width, depth)
    if table.nbytes != values * width:
        raise Damaged("a table of another size")
    numbers = _shaped(rest[table_bytes:], count, columns, turned, count * (1 + (values > 256)))
    if len(numbers) and int(numbers.max()) >= values:
        raise Damaged("a number beyond its table")
    return table.view(kind)[numbers]


def _shaped(data: bytes, count: int, columns: int, turned: bool, size: int) -> np.ndarray:
    """Coded symbols (count,) that fill at most ``size`` bytes."""
    if not columns or count % columns or count > size:
        raise Damaged("rows that do not fill the block")
    rows = count // columns
    if turned:
        return np.ascontiguousarray(entropy.decode(data, columns, rows).T).reshape(-1)
    return entropy.decode(data, rows, columns).reshape(-1)


def _decode_zeros(data: bytes, size: int, depth: int) -> np.ndarray:
    head = struct.Struct("<BIII?")
    width, count, columns, pattern_bytes, down = head.unpack_from(data)
    kind = _kind(width)
    if count * width != size or not columns or count % columns:
        raise Damaged("rows that do not fill the block")
    rest = data[head.size :]
    mask = entropy.decode(rest[:pattern_bytes], 1, -(-count // GROUP))[0]
    flags = np.unpackbits(mask[:, None], axis=1, count=GROUP, bitorder="little")
    zero = flags.reshape(-1)[:count].astype(bool)
    if down:
        zero = np.ascontiguousarray(zero.reshape(columns, count // columns).T).reshape(-1)
    kept = decode(rest[pattern_bytes:], int((~zero).sum()) * width, depth + 1).view(kind)
    made = np.zeros(count, kind)
    made[~zero] = kept
    return made


def _decode_planes(data: bytes, size: int, depth: int) -> np.ndarray:
    head = struct.Struct("<BI?")
    width, count, floats = head.unpack_from(data)
    kind = _kind(width)
    lengths = struct.unpack_from(f"<{width}I", data, head.size)
    if count * width != size:
        raise Damaged("planes that do not fill the block")
    planes = np.empty((count, width), np.uint8)
    at = head.size + 4 * width
    for number, length in enumerate(lengths):
        planes[:, number] = decode(data[at : at + length], count, depth + 1)
        at += length
    turned = planes.reshape(-1).view(kind)
    if not floats or width == 1:
        return turned
    return (turned >> np.array(1, kind)) | (turned << np.array(8 * width - 1, kind))


def _kind(width: int) -> np.dtype:
    if width not in (1, 2, 4, 8):
        raise Damaged(f"elements of {width} bytes")
    return np.dtype(f"<u{width}")


_DECODERS: dict[int, Callable[[bytes, int, int], np.ndarray]] = {
    RAW: _decode_raw,
    ZSTD: _decode_zstd,
    XZ: _decode_xz,
    XZ_TEXT: _decode_xz_text,
    SYMBOLS: _decode_symbols,
    PALETTE: _decode_palette,
    ZEROS: _decode_zeros,
    PLANES: _decode_planes,
}
