# SPDX-License-Identifier: MIT
"""What comes on one connection goes out on another, both ways, until both have ended."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

CHUNK: Final = 256 * 1024
_RESET: Final = struct.pack("ii", 1, 0)
"""To linger for no time: the kernel then says that the connection is reset."""


@contextlib.contextmanager
def reset_on_failure(writer: asyncio.StreamWriter) -> Iterator[None]:
    """What was cut off must not end as if all of it had come: many protocols have no other end mark."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # it may be closed already
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        writer.transport.abort()
        raise


async def closed(writer: asyncio.StreamWriter) -> None:
    """Closes, and waits until all that was written is taken: by who takes nothing it would stay open alone.

    Whoever is cancelled meanwhile has yet to abort it.
    """
    writer.close()
    with contextlib.suppress(OSError):  # the other end is gone, and nothing is left to wait for
        await writer.wait_closed()


async def both(one: Awaitable[None], other: Awaitable[None]) -> None:
    """Until both have ended; the first that fails ends the other."""
    async with contextlib.AsyncExitStack():
        tasks = [asyncio.ensure_future(one), asyncio.ensure_future(other)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, touch: Callable[[], None] | None = None
) -> None:
    """All that comes, and its end."""
    while data := await reader.read(CHUNK):
        if touch is not None:
            touch()
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
