# SPDX-License-Identifier: MIT
"""What the WebSocket routes share: who is on the other side, and how a connection ends."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import litestar
import msgspec
from litestar import exceptions

from banger.contract import resources
from banger.owner import peers

_log = logging.getLogger(__name__)
Socket = litestar.WebSocket[object, object, litestar.datastructures.State]


def left() -> exceptions.WebSocketDisconnect:
    return exceptions.WebSocketDisconnect(detail="the client left")


def leaving(socket: Socket) -> asyncio.Task[bool]:
    """Done when the client is gone, even while nothing of it is read."""
    return asyncio.create_task(socket.scope["state"][peers.GONE].wait())


async def say_goodbye(socket: Socket, end: resources.Resource) -> None:
    try:
        await socket.send_text(msgspec.json.encode(end).decode())
        await socket.close()
    except exceptions.WebSocketException:
        _log.debug("client left before the end", extra={"ref": socket.url.path})


async def stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: what mattered has been raised
