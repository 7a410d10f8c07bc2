# SPDX-License-Identifier: MIT
"""/v1/vms/{ref}/exec: a command in a guest, over a WebSocket. At most a message is held, or a window."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Final

import litestar
import msgspec
from litestar import exceptions, params

from banger.contract import decoding, errors, guest, names, resources
from banger.owner import guest as guests
from banger.owner import operations, routes
from banger.owner.routes import sockets

_log = logging.getLogger(__name__)


@litestar.websocket("/v1/vms/{ref:str}/exec")
async def exec_in_vm(socket: sockets.Socket, ref: params.FromPath[str], services: routes.Injected) -> None:
    """Runs a command in a running VM."""
    await socket.accept()
    announced: tuple[names.VmId, resources.ExecRequest] | None = None
    began, end = time.monotonic(), None
    try:
        request = decoding.json(await socket.receive_text(), resources.ExecRequest)
        vm_id = services.sessions.announced(ref, request)
        announced = (vm_id, request)
        if request.hold:
            await _until_told(socket)
        end = await _run(socket, vm_id, request, services)
    except exceptions.WebSocketException:
        _log.debug("client left before the end", extra={"ref": ref})
    except msgspec.DecodeError as error:
        end = _error(errors.BadRequestError(f"malformed exec message: {error}"))
    except errors.BangerError as error:
        end = _error(error)
    finally:
        _log_end(ref, end, time.monotonic() - began)
        if announced is not None:
            await services.sessions.finished(*announced)
    if end is not None:
        await sockets.say_goodbye(socket, end)


def _error(error: errors.BangerError) -> resources.ExecEnd:
    return resources.ExecEnd(error=errors.to_body(error, op_id=operations.current_op_id.get()))


def _log_end(ref: str, end: resources.ExecEnd | None, elapsed_s: float) -> None:
    """Never what was run, nor what went in or out: secrets travel there."""
    fields: dict[str, object] = {"ref": ref, "elapsed_ms": round(elapsed_s * 1000, 1)}
    if end is None:
        fields["left"] = True
    elif end.error is not None:
        fields |= {"code": end.error.code, "error": end.error.message}
    else:
        fields["exit_status"] = end.exit_status
    _log.info("command ended", extra=fields)


async def _until_told(socket: sockets.Socket) -> None:
    """What comes before the word to begin is lost: nothing runs yet that it could be for."""
    while True:
        message = await socket.receive()
        if message["type"] != "websocket.receive":
            raise exceptions.WebSocketDisconnect(detail="the client left")
        if decoding.json(message.get("text") or "{}", resources.ExecControl).begin:
            return


async def _run(
    socket: sockets.Socket, vm_id: names.VmId, request: resources.ExecRequest, services: routes.Services
) -> resources.ExecEnd:
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(services.sessions.exec(vm_id, request))
        heard = stack.enter_context(services.sessions.notices(vm_id))
        given = _Input(is_counted=request.windowed)
        telling = asyncio.create_task(_tell(socket, heard if request.notices else asyncio.Queue()))
        sending = asyncio.create_task(_send_output(socket, running))
        receiving = asyncio.create_task(_receive(socket, running, given))
        feeding = asyncio.create_task(_feed(socket, running, given))
        # Input that the command does not take may keep us from reading, and so from seeing the client leave.
        leaving = sockets.leaving(socket)
        try:
            await asyncio.wait({sending, receiving, feeding, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                await _tell_rest(socket, heard, request)
                status = sending.result()
            elif receiving.done() or feeding.done():
                await (receiving if receiving.done() else feeding)
                status = await sending
            else:
                raise sockets.left()
        finally:
            await sockets.stop(sending, receiving, feeding, leaving, telling)
    return resources.ExecEnd(exit_status=status.as_shell, signal=status.signal)


async def _tell_rest(
    socket: sockets.Socket, heard: asyncio.Queue[str], request: resources.ExecRequest
) -> None:
    """What was said just before the command ended, which may be why it did."""
    while request.notices and not heard.empty():
        await _send_notice(socket, heard.get_nowait())


async def _send_notice(socket: sockets.Socket, text: str) -> None:
    await _say(socket, resources.ExecNotice(notice=text))


async def _say(socket: sockets.Socket, notice: resources.ExecNotice) -> None:
    await socket.send_text(msgspec.json.encode(notice).decode())


async def _tell(socket: sockets.Socket, heard: asyncio.Queue[str]) -> None:
    while True:
        await _send_notice(socket, await heard.get())


async def _send_output(socket: sockets.Socket, running: guests.Exec) -> guest.ExitStatus:
    async for event in running.output():
        if isinstance(event, guest.ExitStatus):
            return event
        stream, data = event
        await socket.send_bytes(bytes((stream,)) + data)
    raise errors.ProtocolError("the guest's agent ended the command without a status")


class _Input:
    """What a client sent for the command, which has not taken it yet.

    Of a client that counts it is a window at most, and the client is heard meanwhile; of another it is one
    message.
    """

    def __init__(self, *, is_counted: bool) -> None:
        self.is_counted = is_counted
        self.held: asyncio.Queue[bytes] = asyncio.Queue()
        self.held_bytes = 0

    async def put(self, data: bytes) -> None:
        self.held_bytes += len(data)
        if self.is_counted and self.held_bytes > resources.EXEC_WINDOW_BYTES:
            raise errors.BadRequestError("more input than a window holds")
        self.held.put_nowait(data)
        if not self.is_counted:
            await self.held.join()


async def _feed(socket: sockets.Socket, running: guests.Exec, given: _Input) -> None:
    while True:
        data = await given.held.get()
        await (running.write(data) if data else running.close_stdin())
        given.held_bytes -= len(data)
        if data and given.is_counted:
            await _say(socket, resources.ExecNotice(taken=len(data)))
        given.held.task_done()


async def _receive(socket: sockets.Socket, running: guests.Exec, given: _Input) -> None:
    """Until the client leaves, which raises WebSocketDisconnect."""
    while True:
        message = await socket.receive()
        if message["type"] != "websocket.receive":
            raise sockets.left()
        data = message.get("bytes")
        if data is not None:
            await given.put(data)
            continue
        control = decoding.json(message.get("text") or "{}", resources.ExecControl)
        if control.resize is not None:
            await running.resize(*control.resize)
        if control.signal:
            await running.signal(control.signal)


HANDLERS: Final = (exec_in_vm,)
EXCHANGES: Final[dict[str, dict[str, type[msgspec.Struct]]]] = {
    "exec_in_vm": {
        "first": resources.ExecRequest,
        "later": resources.ExecControl,
        "answers": resources.ExecNotice,
        "last": resources.ExecEnd,
    }
}
"""For the API's documentation: what travels as JSON in each WebSocket."""
