"""Folders of pictures, decoded when they are asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paredown.core.errors import UserError
from paredown.data.files.table import Column, Table

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name
IMAGE, LABEL = "image", "label"


@dataclass(frozen=True)
class Pictures:
    """Pictures as uint8 arrays (H, W, C), or (H, W) where there is one channel.

    Attributes:
        channels: that each is given in; None leaves grey ones grey, and makes others RGB.
    """

    files: tuple[Path, ...]
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray:
        """One of them.

        Raises:
            UserError: it cannot be decoded; names its file.
        """
        from PIL import Image

        path = self.files[row]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as found:
                    return decoded(found, self.channels)
        except Exception as error:  # Pillow's decoders raise what they like
            raise UserError(f"{path}: the picture cannot be read: {error}.") from error


def decoded(found: Any, channels: int | None = None) -> np.ndarray:
    """A picture of Pillow's as a uint8 array.

    Example:
        >>> from PIL import Image
        >>> decoded(Image.new("L", (3, 2))).shape, decoded(Image.new("L", (3, 2)), 3).shape
        ((2, 3), (2, 3, 3))
    """
    mode = MODES.get(channels or 0, "L" if found.mode in ("L", "1") else "RGB")
    if found.mode[0] in "IF":
        raise ValueError(f"its numbers are of another kind than 0 to 255 (mode {found.mode})")
    return np.asarray(found.convert(mode))


def pictures_in(path: Path) -> list[Path]:
    """The files of a folder that are pictures by their ending."""
    return sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)


def read_pictures(path: Path) -> Table:
    """A folder of pictures, or of folders of them whose names are the classes.

    Raises:
        UserError: Pillow is missing, pictures lie beside the folders of classes, or a folder is
            empty.
    """
    check_pillow(path)
    folders = sorted(each for each in path.iterdir() if each.is_dir())
    flat = pictures_in(path)
    if not folders:
        return Table(str(path), {IMAGE: Pictures(tuple(flat))}, named=False)
    if flat:
        raise UserError(
            f"{path}: holds pictures beside folders of them, such as {flat[0].name} beside "
            f"{folders[0].name}; put each into the folder of its class."
        )
    found = {each.name: pictures_in(each) for each in folders}
    empty = next((name for name, files in found.items() if not files), None)
    if empty is not None:
        raise UserError(f"{path}: its folder {empty!r} holds no pictures.")
    labels = np.concatenate([np.full(len(files), n) for n, files in enumerate(found.values())])
    every = tuple(file for files in found.values() for file in files)
    columns: dict[str, Column] = {IMAGE: Pictures(every), LABEL: labels}
    return Table(str(path), columns, classes=tuple(found))


def has_pictures(path: Path) -> bool:
    """Whether a folder, or one in it, holds pictures."""
    inside: Sequence[Path] = [path, *(each for each in path.iterdir() if each.is_dir())]
    return any(pictures_in(each) for each in inside)


def check_pillow(path: Path) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{path}: pictures are read by Pillow: pip install 'paredown[huggingface]', or pillow."
        ) from error
