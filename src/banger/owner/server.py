# SPDX-License-Identifier: MIT
"""The HTTP server on the daemon's unix socket: private from the first instant, ready when it says so."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import uvicorn

import banger
from banger import systemd
from banger.contract import errors, names
from banger.owner import operations, peers

_log = logging.getLogger(__name__)

_SHUTDOWN_S: Final = 5
_QUIET_S: Final = 60.0
_BACKLOG: Final = 256
_MAX_MESSAGE_BYTES: Final = 1024 * 1024

Scope = MutableMapping[str, Any]  # ASGI's own shape
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Application = Callable[[Any, Any, Any], Awaitable[None]]


async def serve(
    application: Application,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    before_shutdown: Callable[[], Awaitable[None]],
) -> None:
    """Until `stop` is set. `before_shutdown` runs when nobody may connect any more; the rest is served."""
    asyncio.get_running_loop().set_exception_handler(_SaidOnce())
    server = _Server(_config(_Guard(application)), stop, before_shutdown)
    await server.serve(sockets=[listener])


class _SaidOnce:
    """asyncio tries a whole backlog whenever it may open no more files, and says so for each connection."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        known = errors.exhausted(error) if isinstance(error, OSError) else None
        if known is None:
            loop.default_exception_handler(context)
        elif loop.time() >= self._quiet_until:
            self._quiet_until = loop.time() + _QUIET_S
            _log.error("cannot take connections", extra={"error": known.message, "hint": known.hint})


def _config(application: Application) -> uvicorn.Config:
    return uvicorn.Config(
        application,
        http=peers.HttpProtocol,
        ws=peers.WebSocketProtocol,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        ws_per_message_deflate=False,
        ws_max_size=_MAX_MESSAGE_BYTES,
        # A client that waits for its terminal or the guest answers no ping; the kernel says who is gone.
        ws_ping_interval=None,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )


class _Guard:
    """Refuses peers that are neither the owner nor root, and gives each request an id of its own."""

    def __init__(self, application: Application) -> None:
        self._application = application
        self._allowed = frozenset({0, os.getuid()})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operations.current_op_id.set(names.new_id())
        peer = scope["state"][peers.PEER]
        if peer.uid in self._allowed:
            await self._application(scope, receive, send)
            return
        _log.warning("peer refused", extra={"uid": peer.uid, "pid": peer.pid, "path": scope["path"]})
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _refuse(send, peer.uid)


async def _refuse(send: Send, uid: int) -> None:
    error = errors.UnauthorizedError(f"uid {uid} may not use this daemon")
    body = msgspec.json.encode(errors.to_body(error, op_id=operations.current_op_id.get()))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Server(uvicorn.Server):
    """Says READY to systemd only once it accepts, leaves signals to us, sleeps when it is idle."""

    def __init__(
        self, config: uvicorn.Config, stop: asyncio.Event, before_shutdown: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self._stop = stop
        self._before_shutdown = before_shutdown

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        systemd.notify("READY=1")
        _log.info("ready", extra={"version": banger.__version__, "pid": os.getpid()})

    async def main_loop(self) -> None:
        """uvicorn's own wakes ten times a second."""
        await systemd.beat_until(self._stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        systemd.notify("STOPPING=1")
        _log.info("stopping")
        for server in self.servers:
            server.close()
        await self._before_shutdown()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would raise the signal again at its end, and so end the process before its clean-up."""
        yield


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket that is the owner's alone from its first instant on; its path goes with it, if still ours.

    Raises ConflictError when somebody answers there already.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        _clear(path)
        _bind(listener, path)
        ours = _identity(path)
        try:
            listener.listen(_BACKLOG)
            yield listener
        finally:
            if _identity(path) == ours:
                path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Removes a socket that nobody listens on any more, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise errors.ConflictError(f"{path} is in the way: it is not a socket", hint="move it aside")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise errors.ConflictError(f"something answers at {path} already", hint="is another bangerd running?")


def _bind(listener: socket.socket, path: Path) -> None:
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise errors.UnavailableError(f"cannot listen at {path}: {error}") from error
    finally:
        os.umask(before)


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        return found.st_dev, found.st_ino
    return None
