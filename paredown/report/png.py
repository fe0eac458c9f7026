"""A tensor as a picture."""

from __future__ import annotations

import base64
import struct
import zlib

from torch import Tensor


def picture(image: Tensor) -> str | None:
    """A (C, H, W) or (H, W) tensor as a PNG data URI, stretched to full contrast; else None.

    Example:
        >>> import torch
        >>> picture(torch.rand(1, 8, 8))[:22], picture(torch.rand(5))
        ('data:image/png;base64,', None)
    """
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3 or image.shape[0] not in (1, 3) or not 4 <= min(image.shape[1:]) <= 512:
        return None
    values = image.detach().float()
    span = (values.max() - values.min()).clamp(min=1e-12)
    pixels = (
        ((values - values.min()) / span * 255).round().byte().permute(1, 2, 0).numpy()
    )  # (H, W, C)
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    kind = 0 if channels == 1 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(name, body)
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
