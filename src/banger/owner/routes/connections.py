# SPDX-License-Identifier: MIT
"""/v1/vms/{ref}/connect, bytes to and from a port of a guest over a WebSocket; and what ssh needs."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import litestar
import msgspec
from litestar import exceptions, params

from banger.contract import decoding, errors, reach
from banger.owner import guest as guests
from banger.owner import operations, routes
from banger.owner.routes import sockets

_log = logging.getLogger(__name__)


@litestar.websocket("/v1/vms/{ref:str}/connect")
async def connect_to_vm(
    socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected
) -> None:
    """Connects to a port of a running VM, whether or not it has a network."""
    await socket.accept()
    end: reach.ConnectEnd | None = None
    try:
        request = decoding.json(await socket.receive_text(), reach.ConnectRequest)
        await _run(socket, ref, request, services)
        end = reach.ConnectEnd()
    except exceptions.WebSocketException:
        _log.debug("client left", extra={"ref": ref})
    except msgspec.DecodeError as error:
        end = _error(errors.BadRequestError(f"malformed connect message: {error}"))
    except errors.BangerError as error:
        end = _error(error)
        _log.info("connection refused or lost", extra={"ref": ref, "error": error.message})
    if end is not None:
        await sockets.say_goodbye(socket, end)


def _error(error: errors.BangerError) -> reach.ConnectEnd:
    return reach.ConnectEnd(error=errors.to_body(error, op_id=operations.current_op_id.get()))


async def _run(
    socket: sockets.Socket, ref: str, request: reach.ConnectRequest, services: routes.Services
) -> None:
    """Until both directions have ended; raises when the client leaves before."""
    leaving = sockets.leaving(socket)
    passing = asyncio.create_task(_connect(socket, ref, request, services))
    try:
        await asyncio.wait({leaving, passing}, return_when=asyncio.FIRST_COMPLETED)
        if not passing.done():
            raise sockets.left()
        passing.result()
    finally:
        await sockets.stop(passing, leaving)


async def _connect(
    socket: sockets.Socket, ref: str, request: reach.ConnectRequest, services: routes.Services
) -> None:
    async with services.sessions.connect(ref, request) as tunnel:
        sending = asyncio.create_task(_to_client(socket, tunnel))
        receiving = asyncio.create_task(_to_guest(socket, tunnel))
        try:
            done, _ = await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            await sockets.stop(sending, receiving)


async def _to_client(socket: sockets.Socket, tunnel: guests.Tunnel) -> None:
    while data := await tunnel.read():
        await socket.send_bytes(data)
    await socket.send_bytes(b"")


async def _to_guest(socket: sockets.Socket, tunnel: guests.Tunnel) -> None:
    while True:
        message = await socket.receive()
        if message["type"] != "websocket.receive":
            raise sockets.left()
        data = message.get("bytes")
        if data is None:
            raise errors.BadRequestError("a connection takes binary messages only")
        if not data:
            await tunnel.end()
            return
        await tunnel.write(data)


@litestar.get("/v1/ssh")
async def get_ssh(services: routes.Injected) -> reach.SshAccess:
    """The key that guests accept, and where their host keys are pinned."""
    return await asyncio.to_thread(services.ssh.access)


HANDLERS: Final = (connect_to_vm, get_ssh)
EXCHANGES: Final[dict[str, dict[str, type[msgspec.Struct]]]] = {
    "connect_to_vm": {"first": reach.ConnectRequest, "last": reach.ConnectEnd}
}
"""As in `commands`."""
