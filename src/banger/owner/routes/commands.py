# SPDX-License-Identifier: MIT
"""/v1/vms/{ref}/exec: a command in a guest, over a WebSocket. At most one message is held each way."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import litestar
import msgspec
from litestar import exceptions

from banger.contract import errors, guest, resources
from banger.owner import guest as guests
from banger.owner import routes

_log = logging.getLogger(__name__)
Socket = litestar.WebSocket[object, object, litestar.datastructures.State]


@litestar.websocket("/v1/vms/{ref:str}/exec")
async def exec_in_vm(socket: Socket, ref: str, services: routes.Services) -> None:
    """See ExecRequest, ExecControl and ExecEnd for the messages."""
    await socket.accept()
    request: resources.ExecRequest | None = None
    try:
        request = msgspec.json.decode(await socket.receive_text(), type=resources.ExecRequest)
        end = await _run(socket, ref, request, services)
    except exceptions.WebSocketDisconnect:
        return
    except msgspec.DecodeError as error:
        end = _error(errors.BadRequestError(f"malformed exec request: {error}"))
    except errors.BangerError as error:
        end = _error(error)
    finally:
        if request is not None:
            await services.vms.exec_finished(ref, request)
    try:
        await socket.send_text(msgspec.json.encode(end).decode())
        await socket.close()
    except exceptions.WebSocketException:
        _log.debug("client left before the end", extra={"ref": ref})


def _error(error: errors.BangerError) -> resources.ExecEnd:
    return resources.ExecEnd(error=errors.to_body(error))


async def _run(
    socket: Socket, ref: str, request: resources.ExecRequest, services: routes.Services
) -> resources.ExecEnd:
    async with services.vms.exec(ref, request) as running:
        sending = asyncio.create_task(_send_output(socket, running))
        receiving = asyncio.create_task(_receive_input(socket, running))
        try:
            await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done() and not sending.done():
                receiving.result()
            status = await sending
        finally:
            await _stop(sending, receiving)
    return resources.ExecEnd(exit_status=status.as_shell, signal=status.signal)


async def _send_output(socket: Socket, running: guests.Exec) -> guest.ExitStatus:
    async for event in running.output():
        if isinstance(event, guest.ExitStatus):
            return event
        stream, data = event
        await socket.send_bytes(bytes((stream,)) + data)
    raise errors.ProtocolError("the guest's agent ended the command without a status")


async def _receive_input(socket: Socket, running: guests.Exec) -> None:
    """Until the client leaves, which raises WebSocketDisconnect."""
    while True:
        message = await socket.receive()
        if message["type"] != "websocket.receive":
            raise exceptions.WebSocketDisconnect(detail="the client left")
        data = message.get("bytes")
        if data is not None:
            await (running.write(data) if data else running.close_stdin())
            continue
        control = msgspec.json.decode(message.get("text") or "{}", type=resources.ExecControl)
        if control.resize is not None:
            await running.resize(*control.resize)
        if control.signal:
            await running.signal(control.signal)


async def _stop(*tasks: asyncio.Task[guest.ExitStatus] | asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


HANDLERS: Final = (exec_in_vm,)
