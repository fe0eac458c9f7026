"""NumPy's files: ``.npz``, ``.npy`` and folders of these. Nothing in them is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from paredown.core.errors import UserError
from paredown.data.files.table import Column, Table
from paredown.graph import machine

KINDS = "biufU"  # of NumPy's dtypes: booleans, whole numbers, floats and texts
SHARE = 0.5  # of the free memory that what is packed may take once it is read
BROKEN = (  # NotImplementedError is one too: a zip that is packed in another way, or has a password
    *(OSError, EOFError, ValueError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, LookupError, TypeError, OverflowError),
)


def read_npz(path: Path) -> Table:
    """The arrays of an ``.npz`` file, a column each; those that are not packed are mapped.

    Raises:
        UserError: it is no such file or damaged, holds objects, or takes more memory than is free.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            members = packed.infolist()
            _check_memory(path, members)
            names = [_name(each.filename) for each in members]
            if len(set(names)) < len(names):
                raise ValueError("an array is there twice")
            columns = {
                name: _member(path, packed, each) for name, each in zip(names, members, strict=True)
            }
    except BROKEN as error:
        raise UserError(f"{path}: is no .npz file, or a damaged one: {error}.") from error
    return Table(str(path), columns, named=len(columns) > 1 or "arr_0" not in columns)


def read_npy(path: Path) -> Table:
    """The one array of an ``.npy`` file, which is mapped.

    Raises:
        UserError: it is no such file or damaged, or holds objects.
    """
    return Table(str(path), {path.stem: _mapped(path)}, named=False)


def read_folder(path: Path) -> Table:
    """The arrays of a folder of ``.npy`` files, a column each by the file's name.

    Raises:
        UserError: as `read_npy`.
    """
    files = sorted(path.glob("*.npy"))
    return Table(str(path), {file.stem: _mapped(file) for file in files}, named=len(files) > 1)


def _name(member: str) -> str:
    return member.removesuffix(".npy")


def _check_memory(path: Path, members: list[zipfile.ZipInfo]) -> None:
    packed = sum(each.file_size for each in members if each.compress_type != zipfile.ZIP_STORED)
    free = machine.free_bytes()
    if packed > SHARE * free:
        raise UserError(
            f"{path}: takes {packed / 1e9:.3g} GB once it is unpacked, and {free / 1e9:.3g} GB of "
            "memory are free; save it with np.savez, which does not pack it, or as .npy files."
        )


def _member(path: Path, packed: zipfile.ZipFile, each: zipfile.ZipInfo) -> Column:
    """One array; mapped where it lies in the file as it is."""
    with packed.open(each) as stream:
        shape, fortran, dtype = _header(f"{path}: {_name(each.filename)!r}", stream)
        start = stream.tell()
        held = math.prod(shape) * dtype.itemsize
        if start + held != each.file_size:
            raise ValueError(f"{each.filename} is of {each.file_size} bytes, not {start + held}")
        order: Any = "F" if fortran else "C"
        if each.compress_type == zipfile.ZIP_STORED and held:
            where = _begin(path, each) + start
            return np.memmap(path, dtype, "r", where, shape, order)
        data = bytearray(held)
        _fill(stream, memoryview(data))
        return np.frombuffer(data, dtype).reshape(shape, order=order)


def _fill(stream: IO[bytes], view: memoryview) -> None:
    while view:
        part = stream.read(min(len(view), 2**24))
        if not part:
            raise EOFError("it ends too early")
        view[: len(part)] = part
        view = view[len(part) :]


def _begin(path: Path, each: zipfile.ZipInfo) -> int:
    """Where in the file the bytes of a member begin, by its own header, which is 30 bytes and two
    texts long."""
    with path.open("rb") as file:
        file.seek(each.header_offset)
        header = file.read(30)
    lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    begin = each.header_offset + 30 + sum(lengths)
    if header[:4] != b"PK\x03\x04" or begin + each.file_size > path.stat().st_size:
        raise ValueError(f"{each.filename} lies outside the file")
    return begin


def _header(where: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    _check(where, shape, dtype)
    return shape, fortran, dtype


def _mapped(path: Path) -> Column:
    try:
        with path.open("rb") as stream:
            _header(str(path), stream)
        found: Column = np.load(path, mmap_mode="r", allow_pickle=False)
        return found
    except BROKEN as error:
        raise UserError(f"{path}: is no .npy file, or a damaged one: {error}.") from error


def _check(where: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise UserError(
            f"{where}: holds pickled objects, which are code and are not read; save arrays of "
            "numbers or texts."
        )
    if dtype.kind not in KINDS:
        raise UserError(f"{where}: expected numbers or texts, got {dtype}.")
    if not shape:
        raise UserError(
            f"{where}: is a single value; expected one for each sample, the first dimension "
            "counting them."
        )
