# SPDX-License-Identifier: MIT
"""A TCP server whose end is the end of its connections too, even of one that comes at that moment.

`asyncio.start_server` does not give that: what it has accepted, but not yet handed over, stays open when the
server closes (CPython 3.11, `BaseSelectorEventLoop._accept_connection2`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Final

from banger.net import carry

_log = logging.getLogger(__name__)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]

_PAUSE_S: Final = 1.0
"""Before the next try, when this process has no descriptor left for one more."""
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
"""A peer that vanished without a word is missed after two minutes; else each would keep a place for ever."""
_LOOK_S: Final = 30.0
"""asyncio does not hear that a peer is gone which had said its last: nothing is read from it any more."""


class TcpServer:
    """Serves each connection in a task of its own, at most `most` at once, and hangs up when it returns."""

    def __init__(self, serve: Serve, *, most: int, limit: int = 64 * 1024) -> None:
        """`limit`: bytes of one connection that wait to be read."""
        self._serve = serve
        self._most = most
        self._limit = limit
        self._listening: socket.socket | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._look: asyncio.TimerHandle | None = None
        self._fresh: set[socket.socket] = set()
        """Those whose task has not begun; one that is cancelled then would not close what it has."""

    def start(self, listening: socket.socket) -> None:
        """Owns the socket, which does not block, from here on."""
        self._listening = listening
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    async def close(self) -> None:
        for timer in (self._pause, self._look):
            if timer is not None:
                timer.cancel()
        if self._listening is not None:
            asyncio.get_running_loop().remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, _ = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.error("cannot take a connection", extra={"error": str(error)})
            loop = asyncio.get_running_loop()
            loop.remove_reader(listening)
            self._pause = loop.call_later(_PAUSE_S, loop.add_reader, listening, self._accept, listening)
            return
        if len(self._tasks) >= self._most:
            connection.close()
            return
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._fresh.add(connection)
        task = asyncio.create_task(self._run(connection))
        self._tasks[task] = connection
        if self._look is None:
            self._look_later()

        def done(ended: asyncio.Task[None]) -> None:
            del self._tasks[ended]
            if connection in self._fresh:
                self._fresh.remove(connection)
                connection.close()

        task.add_done_callback(done)

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(_LOOK_S, self._end_gone)

    def _end_gone(self) -> None:
        """While there is anybody."""
        for task, connection in self._tasks.items():
            if connection.fileno() >= 0 and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                task.cancel()
        self._look = None
        if self._tasks:
            self._look_later()

    async def _run(self, connection: socket.socket) -> None:
        self._fresh.remove(connection)
        reader, writer = await asyncio.open_connection(sock=connection, limit=self._limit)
        try:
            await self._serve(reader, writer)
            await carry.closed(writer)  # who takes nothing keeps the place, and goes with the server
        finally:
            writer.transport.abort()
