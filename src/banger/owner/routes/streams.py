# SPDX-License-Identifier: MIT
"""Workspaces and files over WebSockets: JSON messages, and streams of binary ones that an empty one ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, TypeVar

import litestar
import msgspec
from litestar import exceptions, params

from banger.contract import decoding, errors, resources, transfers
from banger.owner import operations, peers, routes
from banger.owner.routes import sockets

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Link:
    """One client; meets `workspaces.Peer`. At most one message is held each way."""

    def __init__(self, socket: sockets.Socket) -> None:
        self._socket = socket
        self.pid: int = socket.scope["state"][peers.PEER].pid

    async def hear(self, kind: type[T], /) -> T:
        message = await self._receive()
        try:
            return decoding.json(message.get("text") or "", kind)
        except msgspec.DecodeError as error:
            raise errors.BadRequestError(f"malformed message: {error}") from error

    async def pieces(self) -> AsyncIterator[bytes]:
        while True:
            data = (await self._receive()).get("bytes")
            if data is None:
                raise errors.BadRequestError("a stream of binary messages was expected")
            if not data:
                return
            yield data

    async def tell(self, message: resources.Resource, /) -> None:
        await self._socket.send_text(msgspec.json.encode(message).decode())

    async def send(self, data: bytes, /) -> None:
        await self._socket.send_bytes(data)

    async def end(self) -> None:
        await self._socket.send_bytes(b"")

    async def _receive(self) -> dict[str, Any]:
        message = await self._socket.receive()
        if message["type"] != "websocket.receive":
            raise sockets.left()
        return dict(message)


Work = Callable[[str, Link], Coroutine[Any, Any, resources.Resource]]


async def _serve(
    socket: sockets.Socket, ref: str, work: Work, failed: Callable[[errors.ErrorBody], resources.Resource]
) -> None:
    """Does the work while the client is there; its outcome is the last message."""
    await socket.accept()
    link = Link(socket)
    working = asyncio.create_task(work(ref, link))
    leaving = sockets.leaving(socket)
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            _log.info("client left before the end", extra={"ref": ref})
            return
        end = working.result()
    except exceptions.WebSocketException:
        _log.info("client left before the end", extra={"ref": ref})
        return
    except errors.BangerError as error:
        _log.info("request failed", extra={"ref": ref, "code": error.code, "error": error.message})
        end = failed(errors.to_body(error, op_id=operations.current_op_id.get()))
    finally:
        await sockets.stop(working, leaving)
    await sockets.say_goodbye(socket, end)


def _prepared(error: errors.ErrorBody) -> resources.Resource:
    return transfers.Prepared(error=error)


def _transferred(error: errors.ErrorBody) -> resources.Resource:
    return transfers.Transferred(error=error)


@litestar.websocket("/v1/vms/{ref:str}/workspace/prepare")
async def prepare_workspace(
    socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected
) -> None:
    """Takes a repository into a running VM."""
    await _serve(socket, ref, services.workspaces.prepare, _prepared)


@litestar.websocket("/v1/vms/{ref:str}/workspace/export")
async def export_workspace(
    socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected
) -> None:
    """Gives out what changed in a workspace."""
    await _serve(socket, ref, services.workspaces.export, _transferred)


@litestar.websocket("/v1/vms/{ref:str}/put")
async def put_files(socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected) -> None:
    """Unpacks a tar in a running VM."""
    await _serve(socket, ref, services.workspaces.put, _transferred)


@litestar.websocket("/v1/vms/{ref:str}/get")
async def get_files(socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected) -> None:
    """Packs a path of a running VM as a tar."""
    await _serve(socket, ref, services.workspaces.get, _transferred)


HANDLERS: Final = (prepare_workspace, export_workspace, put_files, get_files)
EXCHANGES: Final[dict[str, dict[str, type[msgspec.Struct]]]] = {
    "prepare_workspace": {
        "first": transfers.PrepareRequest,
        "later": transfers.PreparePlan,
        "answers": transfers.WorkspaceState,
        "last": transfers.Prepared,
    },
    "export_workspace": {
        "first": transfers.ExportRequest,
        "answers": transfers.Exported,
        "last": transfers.Transferred,
    },
    "put_files": {"first": transfers.PutRequest, "last": transfers.Transferred},
    "get_files": {"first": transfers.GetRequest, "last": transfers.Transferred},
}
"""For the API's documentation: what travels as JSON in each."""
