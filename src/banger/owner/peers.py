# SPDX-License-Identifier: MIT
"""Who is on the other end of the daemon's socket, and whether they are still there. Used by `server.py`.

uvicorn knows neither a unix socket's peer nor, while a WebSocket's reading is paused, that it hung up; so
its two protocol classes learn both here, and hand them to the routes as `scope["state"]`.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Final

from uvicorn.protocols.http import h11_impl
from uvicorn.protocols.websockets import websockets_sansio_impl

from banger.contract import peer

PEER: Final = "peer"
GONE: Final = "gone"


class HangUp:
    """`event` is set when the other end has closed, whether or not anybody reads from the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # A poll of its own: the loop's says nothing of a descriptor whose reading is paused.
        self._poll = select.epoll()
        self._poll.register(connection.fileno(), select.EPOLLRDHUP | select.EPOLLHUP)
        self._loop.add_reader(self._poll.fileno(), self.close)

    def close(self) -> None:
        self.event.set()
        if not self._poll.closed:
            self._loop.remove_reader(self._poll.fileno())
            self._poll.close()


class HttpProtocol(h11_impl.H11Protocol):
    """HTTP/1.1 with the peer in the request's state."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {**self.app_state, PEER: peer.of(transport.get_extra_info("socket"))}
        super().connection_made(transport)


class WebSocketProtocol(websockets_sansio_impl.WebSocketsSansIOProtocol):
    """A WebSocket with an event in its state for when the client is gone."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._hang_up = HangUp(transport.get_extra_info("socket"))
        self.app_state = {**self.app_state, GONE: self._hang_up.event}
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hang_up.close()
        super().connection_lost(exc)
