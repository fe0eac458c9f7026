"""The body of an HTTP request, read within bounds of time and size."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from paredown.ship.serve.bodies import unpacked
from paredown.ship.serve.refused import Refused
from paredown.ship.serve.tensors import MOST_BYTES

BODY_S = 5.0  # the longest that a client may take to send a body
MOST_HELD = 2**28  # bytes of bodies that are held at once, of all requests together
LARGE = 2**18  # bytes from which a body is unpacked beside the event loop


class Room:
    """How many bytes of bodies are held.

    Example:
        >>> room = Room(10)
        >>> room.take(8)
        >>> room.take(8)
        Traceback (most recent call last):
            ...
        paredown.ship.serve.refused.Refused: too many large requests at once; try again later.
    """

    def __init__(self, most: int = MOST_HELD) -> None:
        self.most, self.held = most, 0

    def take(self, size: int) -> None:
        """Hold more.

        Raises:
            Refused: there is no room (503).
        """
        if self.held + size > self.most:
            raise Refused(503, "too many large requests at once; try again later.")
        self.held += size

    def give(self, size: int) -> None:
        self.held -= size


async def body_of(request: Request, room: Room, most: int = MOST_BYTES) -> tuple[bytes, int]:
    """The body, unpacked, and how much room was taken for it, to be given back by the caller.

    Raises:
        Refused: it is too large (413), comes too slowly (408), is no such compression, or there is
            no room (503).
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > most:
        raise Refused(413, f"body: {most} bytes are taken at most.")
    taken = 0
    try:
        raw, taken = await _read(request, room, most)
        encoding = request.headers.get("content-encoding", "")
        if not encoding:
            return raw, taken
        if len(raw) > LARGE:
            body = await asyncio.to_thread(unpacked, raw, encoding, most)
        else:
            body = unpacked(raw, encoding, most)
        grown = max(0, len(body) - taken)
        room.take(grown)
        return body, taken + grown
    except BaseException:
        room.give(taken)
        raise


async def _read(request: Request, room: Room, most: int) -> tuple[bytes, int]:
    parts, taken = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                room.take(len(part))
                taken += len(part)
                if taken > most:
                    raise Refused(413, f"body: {most} bytes are taken at most.")
                parts.append(part)
        return b"".join(parts), taken
    except TimeoutError:
        room.give(taken)
        raise Refused(408, f"body: did not come within {BODY_S:g} s.") from None
    except ClientDisconnect:
        room.give(taken)
        raise Refused(400, "body: the client went away.") from None
    except Refused:
        room.give(taken)
        raise
