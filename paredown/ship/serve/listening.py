"""The HTTP server around an application, in this process, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from granian.constants import Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from paredown.core.errors import UserError

HEADER_MS = 5_000  # the longest that a client may take to send its headers
BACKLOG, MOST_REQUESTS = 4096, 8192  # slow clients hold their places without keeping others out
ENDS = (signal.SIGTERM, signal.SIGINT)
LOOK_S, STARTED_S = 0.01, 10.0


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        UserError: it is in use, not allowed, or there is no such host.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            found: int = probe.getsockname()[1]
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            said = "is in use; choose another --port, or end what listens there"
        else:
            said = f"cannot be listened on: {error.strerror or error}"
        raise UserError(f"{host}:{port}: {said}.") from error
    return found


async def listen(
    app: Any,
    host: str,
    port: int,
    started: Callable[[], None],
    drain: Callable[[], Awaitable[None]],
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and end.

    Args:
        started: called when requests are taken.
        drain: awaited before the connections are closed.
    """
    server = Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.ASGINL,
        websockets=False,
        backlog=BACKLOG,
        backpressure=MOST_REQUESTS,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_MS),
        log_level=LogLevels.error,
    )
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(server.serve())
    await _answering(host, port, serving)
    for each in ENDS:
        loop.add_signal_handler(each, end.set)
    started()
    waiting = asyncio.create_task(end.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    await drain()
    server.stop()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(serving, STARTED_S)


async def _answering(host: str, port: int, serving: asyncio.Task[Any]) -> None:
    """Wait until the port takes connections.

    Raises:
        UserError: it does not.
    """
    there = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    for _ in range(round(STARTED_S / LOOK_S)):
        if serving.done():
            break
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(there, port)
            writer.close()
            return
        await asyncio.sleep(LOOK_S)
    raise UserError(f"{host}:{port}: the server did not start.")
