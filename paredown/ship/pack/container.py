"""An artifact -> a `.pare` container for delivery, and back, bit for bit."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from paredown.core import progress
from paredown.core.errors import UserError
from paredown.core.files import sync_folder
from paredown.core.settings import check_arguments
from paredown.ship.pack import blocks, groups
from paredown.ship.pack.belonging import belonging
from paredown.ship.pack.blocks import Layout
from paredown.ship.pack.entropy import Damaged
from paredown.ship.pack.index import MAGIC, File, Index, Stream, head_bytes, read, write
from paredown.ship.pack.streams import chunk_layout, gather, streams
from paredown.targets.artifact import parts
from paredown.targets.runtimes import RUNTIMES, runtime

SUFFIX = ".pare"
WHOLE = 1 << 22  # bytes of an artifact up to which it is also tried as one string of bytes
UNBELIEVABLE = 2000  # a container that claims to grow by more than this is refused above 1 GB


@dataclass(frozen=True)
class Part:
    """A stretch of the files inside: how it is coded, and its bytes before and after."""

    coding: str
    element: str
    size_bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Contents:
    """What a container holds, read without decoding it."""

    files: tuple[File, ...]
    parts: tuple[Part, ...]
    packed_bytes: int

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


def pack(path: str | Path, out: str | Path | None = None) -> Path:
    """Pack an artifact into a container, losslessly; what belongs to it goes along.

    Args:
        path: the artifact of any runtime.
        out: the container; by default the artifact's name with ``.pare`` behind it.

    Raises:
        UserError: a folder, a container, a file that cannot be read or is missing, weights in
            another folder than the artifact, or a container that cannot be written; none is left.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "model.onnx"
        ...     size = file.write_bytes(bytes(100_000))
        ...     packed = pack(file)
        ...     (packed.name, packed.stat().st_size < 300, unpack(packed, folder + "/again").name)
        ('model.onnx.pare', True, 'model.onnx')
    """
    check_arguments(path=(path, str | Path), out=(out, str | Path | None))
    path = Path(path)
    with _told(path, "read"):
        _check_unpacked(path)
        paths = belonging(path)
        files = [_file(each) for each in paths]
    target = Path(out) if out is not None else path.with_name(path.name + SUFFIX)
    if target.exists() and any(target.samefile(each) for each in paths):
        raise UserError(f"{target}: is what is to be packed; name another file for the container.")
    if not sum(file.size for file in files):
        raise UserError(f"{path}: is empty.")
    _contain(paths, files, target)
    return target


def _contain(paths: list[Path], files: list[File], target: Path) -> None:
    """Write the container of files, under the names that ``files`` give them."""
    with _told(target, "written"), _unfinished(target) as (stream, _):
        body = _temporary(target)
        try:
            with body.open("w+b") as coded:
                streams = _code(paths, files, coded)
                stream.write(write(Index(tuple(files), tuple(streams))))
                coded.seek(0)
                shutil.copyfileobj(coded, stream, 1 << 20)
        finally:
            body.unlink(missing_ok=True)


def packed_bytes(path: str | Path) -> int:
    """What an artifact takes once it is packed as "model", in bytes; the container is not kept.

    Raises:
        UserError: as `pack`.
    """
    path = Path(path)
    own = parts(path)
    with _told(path, "read"):
        paths = belonging(path)
        files = [_file(each) for each in paths]
    named = [
        replace(file, name=each.with_stem("model").name) if each in own else file
        for file, each in zip(files, paths, strict=True)
    ]
    with tempfile.TemporaryDirectory(prefix="paredown-") as folder:
        _contain(paths, named, Path(folder) / f"model{SUFFIX}")
        return (Path(folder) / f"model{SUFFIX}").stat().st_size


def unpack(path: str | Path, out: str | Path | None = None) -> Path:
    """The artifact in a container, checked against its SHA-256.

    Args:
        out: the folder to put it into; by default the container's.

    Returns:
        the first file of the container; what belongs to it lies beside it.

    Raises:
        UserError: the container is damaged, cut off or hostile, there is no room, or another file
            of a name inside is there already; nothing is left behind then, nor changed.
    """
    check_arguments(path=(path, str | Path), out=(out, str | Path | None))
    path = Path(path)
    folder = Path(out) if out is not None else path.parent
    with _told(path, "read"), path.open("rb") as coded:
        try:
            index = _index(coded)
            _check_size(path, index)
            with _told(folder, "written"):
                _check_names(folder, index)
                folder.mkdir(parents=True, exist_ok=True)
                _check_room(folder, index.size)
                made = _decode(coded, index, folder)
        except Damaged as error:
            raise UserError(f"{path}: cannot be unpacked: {error}.") from error
    return made


def contents(path: str | Path) -> Contents:
    """What a container holds; no tensor is decoded.

    Raises:
        UserError: it is no container, or damaged.
    """
    path = Path(path)
    with _told(path, "read"), path.open("rb") as coded:
        try:
            index = _index(coded)
            found = tuple(_parts(coded, index))
        except Damaged as error:
            raise UserError(f"{path}: cannot be read: {error}.") from error
        return Contents(index.files, found, os.fstat(coded.fileno()).st_size)


# --- packing ---------------------------------------------------------------------------------


def _check_unpacked(path: Path) -> None:
    """Refuse a folder, and what is a container by its bytes, whatever its name."""
    if path.is_dir():
        suffixes = {runtime(name).SUFFIX for name in RUNTIMES}
        ours = sorted(path.glob("model.*")) if (path / "run.json").is_file() else []
        own = next((each for each in ours if each.suffix in suffixes), None)
        instead = f"a run's folder; pack its artifact, {own}" if own else "a folder"
        raise UserError(f"{path}: expected the artifact of a runtime, got {instead}.")
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) == MAGIC:
            raise UserError(
                f"{path}: is packed already; ship it as it is, or get the artifact back with "
                "paredown unpack."
            )


def _file(path: Path) -> File:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
        return File(path.name, stream.tell(), digest.digest())


def _code(paths: Sequence[Path], files: Sequence[File], coded: IO[bytes]) -> list[Stream]:
    """Write every stream's chunks, one in memory at a time; of a small artifact, all in one where
    that is shorter."""
    views = [
        np.memmap(path, np.uint8, "r") if file.size else np.empty(0, np.uint8)
        for path, file in zip(paths, files, strict=True)
    ]
    plans = streams(paths, views)
    made = []
    total = sum(len(plan.pieces()) for plan in plans)
    bar = progress.track(range(total), f"pack {paths[0].name}", total)
    for plan in plans:
        chunks, at = [], 0
        for size in plan.pieces():
            next(bar)
            chunk = groups.encode(gather(views, plan, at, size), chunk_layout(plan.layout, size))
            coded.write(chunk)
            chunks.append(len(chunk))
            at += size
        made.append(Stream(plan.layout, plan.ranges, plan.copies, tuple(chunks)))
    next(bar, None)
    if sum(file.size for file in files) <= WHOLE:
        return _in_one(np.concatenate(views), files, made, coded)
    return made


def _in_one(
    data: np.ndarray, files: Sequence[File], made: list[Stream], coded: IO[bytes]
) -> list[Stream]:
    """One stream of all bytes (N,) instead of those made, where the container is shorter then."""
    chunk = blocks.repeats(data)
    one = [Stream(Layout(), ((0, len(data)),), False, (len(chunk),))]
    apart = len(write(Index(tuple(files), tuple(made)))) + coded.tell()
    if len(write(Index(tuple(files), tuple(one)))) + len(chunk) >= apart:
        return made
    coded.seek(0)
    coded.truncate()
    coded.write(chunk)
    return one


# --- unpacking -------------------------------------------------------------------------------


def _index(coded: IO[bytes]) -> Index:
    head = coded.read(32)
    length = head_bytes(head)
    index, _ = read(head + coded.read(max(0, length - len(head))))
    size = length + sum(sum(stream.chunks) for stream in index.streams)
    if size != os.fstat(coded.fileno()).st_size:
        raise Damaged("it is cut off, or something was added to it")
    coded.seek(length)
    return index


def _check_size(path: Path, index: Index) -> None:
    packed = path.stat().st_size
    if index.size > max(1 << 30, UNBELIEVABLE * packed):
        raise Damaged(f"it claims to hold {index.size / 1e9:.1f} GB in {packed / 1e6:.1f} MB")


def _check_names(folder: Path, index: Index) -> None:
    """That no file of other contents would be written over."""
    for file in index.files:
        there = folder / file.name
        if there.is_symlink() or there.exists():
            if not there.is_file() or _file(there) != file:
                raise UserError(
                    f"{there}: is there already and is not what the container holds; move it away, "
                    "or unpack into another folder."
                )


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        text = f"{folder}: {size / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free."
        raise UserError(text)


def _decode(coded: IO[bytes], index: Index, folder: Path) -> Path:
    """Decode into one unfinished file, check and part it, then give the parts their names."""
    whole = _temporary(folder / "unpacked")
    made: list[Path] = []
    try:
        with whole.open("w+b") as stream:
            stream.truncate(index.size)
            _decode_streams(coded, index, stream)
            stream.seek(0)
            for file in index.files:
                made.append(_part(stream, file, folder))
        for temporary, file in zip(made, index.files, strict=True):
            os.replace(temporary, folder / file.name)
        sync_folder(folder)
    finally:
        for temporary in [whole, *made]:
            temporary.unlink(missing_ok=True)
    return folder / index.files[0].name


def _decode_streams(coded: IO[bytes], index: Index, made: IO[bytes]) -> None:
    total = sum(len(stream.chunks) for stream in index.streams)
    bar = progress.track(range(total), f"unpack {index.files[0].name}", total)
    for stream in index.streams:
        at = 0
        for size, length in zip(stream.pieces(), stream.chunks, strict=True):
            next(bar)
            _scatter(made, stream, at, _decoded(coded.read(length), size))
            at += size
    next(bar, None)


def _decoded(data: bytes, size: int) -> np.ndarray:
    try:
        return groups.decode(data, size)
    except (ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise Damaged(str(error) or "its coded bytes make no sense") from error
    except BaseException as error:  # a panic in the coder is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise Damaged("its coded bytes make no sense") from error


def _scatter(made: IO[bytes], stream: Stream, at: int, block: np.ndarray) -> None:
    """Write bytes ``at`` and up of a stream to wherever they belong."""
    if stream.copies:
        for start, _ in stream.ranges:
            made.seek(start + at)
            made.write(block.data)
        return
    for start, end in stream.ranges:
        length = end - start
        if at < length and len(block):
            made.seek(start + at)
            made.write(block[: length - at].data)
            block, at = block[length - at :], 0
        else:
            at -= min(at, length)


def _part(whole: IO[bytes], file: File, folder: Path) -> Path:
    """The next bytes as a file of their own, still unnamed; checked and on disk."""
    temporary = _temporary(folder / file.name)
    digest, left = hashlib.sha256(), file.size
    try:
        with temporary.open("wb") as stream:
            while left and (part := whole.read(min(left, 1 << 20))):
                digest.update(part)
                stream.write(part)
                left -= len(part)
            stream.flush()
            os.fsync(stream.fileno())
        if left or digest.digest() != file.sha256:
            raise Damaged(f"{file.name} is not what was packed: its SHA-256 differs")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _parts(coded: IO[bytes], index: Index) -> Iterator[Part]:
    for stream in index.streams:
        names = []
        for length in stream.chunks:
            names.append(groups.coding(coded.read(1)))
            coded.seek(max(0, length - 1), os.SEEK_CUR)
        kind = f"float{8 * stream.layout.width}" if stream.layout.floats else "bytes"
        if not stream.layout.floats and stream.layout.width > 1:
            kind = f"int{8 * stream.layout.width}"
        sizes = sum(end - start for start, end in stream.ranges)
        coding = ", ".join(dict.fromkeys(names))
        if stream.copies:
            coding += f", once for {len(stream.ranges)}"
        yield Part(coding, kind, sizes, sum(stream.chunks))


# --- files -----------------------------------------------------------------------------------


def _temporary(path: Path) -> Path:
    return path.with_name(f".paredown-{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A file that gets its name when the block is through, and is gone where it is not."""
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream, temporary
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """What the disk says, in plain words."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and what == "read":
            raise UserError(f"{path}: no such file.") from error
        raise UserError(f"{path}: cannot be {what}: {error.strerror or error}.") from error
