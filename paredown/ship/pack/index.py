"""The head of a container: which files it holds, and where each stretch of their bytes is coded.

    4 bytes   "PARE"            1 byte   version
    u32       bytes of the index, deflated     u32   CRC-32 of them
    u32       bytes of the index, inflated     the same number: it is not deflated

The index is a row of whole numbers (LEB128) and names; the coded chunks follow it. All is
little-endian. It can be read without decoding a single tensor.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from paredown.ship.pack.blocks import Layout
from paredown.ship.pack.entropy import Damaged, deflate, inflate
from paredown.ship.pack.whole_numbers import Reader, number

MAGIC, VERSION = b"PARE", 2
CHUNK = 1 << 23  # bytes that are coded at a time, so that memory stays bounded
MAX_INDEX = 1 << 28
_HEAD = struct.Struct("<4sBIII")


@dataclass(frozen=True)
class File:
    """A file inside: its name without a folder, its size in bytes, and the SHA-256 of it."""

    name: str
    size: int
    sha256: bytes


@dataclass(frozen=True)
class Stream:
    """Bytes that are coded together.

    ``ranges`` are (start, end) in all files behind each other; with ``copies`` each holds the same
    bytes, which are coded once. ``chunks`` are the bytes of each coded chunk.
    """

    layout: Layout
    ranges: tuple[tuple[int, int], ...]
    copies: bool
    chunks: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes that are coded."""
        sizes = [end - start for start, end in self.ranges]
        return sizes[0] if self.copies else sum(sizes)

    def pieces(self) -> list[int]:
        """The size of each chunk before it is coded: whole rows, except in the last."""
        row = self.layout.width * max(1, self.layout.columns)
        step = max(1, CHUNK // row) * row
        return [min(step, self.size - at) for at in range(0, self.size, step)]


@dataclass(frozen=True)
class Index:
    files: tuple[File, ...]
    streams: tuple[Stream, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def write(index: Index) -> bytes:
    """The head of a container.

    Example:
        >>> stream = Stream(Layout(), ((0, 3),), False, (4,))
        >>> index = Index((File("a.onnx", 3, bytes(32)),), (stream,))
        >>> read(write(index))[0] == index
        True
    """
    body = bytearray(number(len(index.files)))
    for file in index.files:
        name = file.name.encode()
        body += number(len(name)) + name + number(file.size) + file.sha256
    body += number(len(index.streams))
    for stream in index.streams:
        layout = stream.layout
        flags = layout.width | layout.floats << 4 | stream.copies << 5
        body += b"".join(map(number, (flags, layout.columns, len(stream.ranges))))
        last = 0
        for start, end in stream.ranges:
            body += number(start - last) + number(end - start)
            last = end
        body += b"".join(map(number, stream.chunks))
    packed = min(bytes(body), deflate(bytes(body)), key=len)
    return _HEAD.pack(MAGIC, VERSION, len(packed), zlib.crc32(packed), len(body)) + packed


def read(data: bytes) -> tuple[Index, int]:
    """The index at the start of ``data``, and how many bytes it takes there.

    Raises:
        Damaged: it is none, or says what cannot be.
    """
    length = head_bytes(data)
    packed = data[_HEAD.size : length]
    _, _, _, crc, size = _HEAD.unpack_from(data)
    if len(data) < length or zlib.crc32(packed) != crc:
        raise Damaged("its index is cut off or changed")
    numbers = Reader(packed if len(packed) == size else inflate(packed, size))
    files = tuple(_file(numbers) for _ in range(numbers.count()))
    streams = tuple(_stream(numbers) for _ in range(numbers.count()))
    numbers.finish()
    index = Index(files, streams)
    _check_cover(index)
    return index, length


def head_bytes(data: bytes) -> int:
    """How many bytes head and index take, from the first 32 bytes.

    Raises:
        Damaged: it is no container, or one of a later version.
    """
    if len(data) < _HEAD.size or data[:4] != MAGIC:
        raise Damaged("it is no .pare container")
    _, version, packed, _, size = _HEAD.unpack_from(data)
    if version != VERSION:
        raise Damaged(f"it is of version {version}; this paredown reads version {VERSION}")
    if size > MAX_INDEX or size > 1100 * packed + 64:
        raise Damaged("its index is larger than an index can be")
    return _HEAD.size + int(packed)


def _file(numbers: Reader) -> File:
    try:
        name = numbers.bytes(numbers.count()).decode()
    except UnicodeDecodeError as error:
        raise Damaged("a file in it has no name") from error
    plain = 0 < len(name) <= 200 and name.isprintable() and not set(name) & set('/\\:<>"|?*')
    if not plain or name.startswith("."):
        raise Damaged(f"a file in it has the name {name[:80]!r}, which may reach out of its folder")
    return File(name, numbers.number(), numbers.bytes(32))


def _stream(numbers: Reader) -> Stream:
    flags, columns, ranges = numbers.number(), numbers.number(), numbers.count()
    layout = Layout(flags & 15, columns, bool(flags >> 4 & 1))
    if layout.width not in (1, 2, 4, 8) or flags >> 6 or not ranges:
        raise Damaged("its index holds an element that is not known")
    found, last = [], 0
    for _ in range(ranges):
        start = last + numbers.number()
        last = start + numbers.number()
        found.append((start, last))
    bare = Stream(layout, tuple(found), bool(flags >> 5 & 1), ())
    if bare.copies and len({end - start for start, end in found}) > 1:
        raise Damaged("its index repeats what has different sizes")
    if -(-bare.size // CHUNK) > numbers.left:
        raise Damaged("its index promises more than it holds")
    chunks = tuple(numbers.number() for _ in bare.pieces())
    return Stream(layout, bare.ranges, bare.copies, chunks)


def _check_cover(index: Index) -> None:
    """That the streams fill every byte of the files exactly once."""
    if not index.files or len({file.name for file in index.files}) < len(index.files):
        raise Damaged("it holds no file, or two of one name")
    at = 0
    for start, end in sorted(_ranges(index)):
        if start != at or end <= start:
            raise Damaged("its index leaves a gap or says something twice")
        at = end
    if at != index.size:
        raise Damaged("its index does not fill its files")


def _ranges(index: Index) -> Iterator[tuple[int, int]]:
    return (each for stream in index.streams for each in stream.ranges)
