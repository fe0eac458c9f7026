"""The body of a request before it is parsed: unpacked, and bounded in size and depth."""

from __future__ import annotations

import re
import zlib

import numpy as np

from paredown.ship.serve.refused import Refused
from paredown.ship.serve.tensors import MOST_BYTES

DEEPEST = 100  # brackets within brackets of JSON
ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS, "identity": 0, "": 0}
BLOCK = 2**20  # bytes looked at together
# A text that does not end reaches to the end: else each quote in it would be looked at as a start.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


def unpacked(body: bytes, encoding: str, most: int = MOST_BYTES) -> bytes:
    """A body without its compression, ``gzip`` or ``deflate``.

    Raises:
        Refused: another encoding, damaged data, or more than ``most`` bytes come out of it.

    Example:
        >>> unpacked(zlib.compress(b"12345"), "deflate")
        b'12345'
    """
    encoding = encoding.strip().lower()
    if encoding not in ENCODINGS:
        raise Refused(415, f"Content-Encoding: expected gzip or deflate, got {encoding[:50]!r}.")
    if not ENCODINGS[encoding]:
        return body
    opener = zlib.decompressobj(ENCODINGS[encoding])
    try:
        found = opener.decompress(body, most + 1)
    except zlib.error as error:
        raise Refused(400, f"Content-Encoding: the body is no {encoding} data.") from error
    if len(found) > most:
        raise Refused(413, f"body: more than {most} bytes when unpacked.")
    if not opener.eof or opener.unused_data:
        raise Refused(400, f"Content-Encoding: the body is no whole {encoding} data.")
    return found


def check_depth(text: bytes | memoryview, deepest: int = DEEPEST) -> None:
    """Refuse JSON that is nested too deeply, without parsing it.

    Raises:
        Refused: brackets stand within more brackets than ``deepest``.

    Example:
        >>> check_depth(b'[[1]]', 1)
        Traceback (most recent call last):
            ...
        paredown.ship.serve.refused.Refused: body: JSON nested more than 1 deep.
    """
    whole = bytes(text)
    if whole.count(b"[") + whole.count(b"{") <= deepest:
        return
    plain = np.frombuffer(_TEXTS.sub(b"", whole), dtype=np.uint8)
    depth = 0
    for start in range(0, len(plain), BLOCK):
        depths = np.cumsum(_STEP[plain[start : start + BLOCK]], dtype=np.int64) + depth
        if depths.max() > deepest:
            raise Refused(400, f"body: JSON nested more than {deepest} deep.")
        depth = int(depths[-1])
