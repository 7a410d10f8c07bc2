# SPDX-License-Identifier: MIT
"""What the fake daemon runs "in a guest": a real process of this machine, with pipes or a pty.

So bytes, signals, window size and exit statuses are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import os
import pty
import signal
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import msgspec

from banger.contract import errors, resources

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def run(request: resources.ExecRequest, receive: Receive, send: Send) -> resources.ExecEnd:
    env = dict(os.environ) | dict(item.split("=", 1) for item in request.env)
    with _streams(request) as streams:
        try:
            process = await asyncio.create_subprocess_exec(
                *request.argv,
                stdin=streams.child_in,
                stdout=streams.child_out,
                stderr=streams.child_err,
                env=env,
                cwd=request.cwd or None,
                preexec_fn=streams.take_terminal if request.tty else os.setsid,
            )
        except FileNotFoundError:
            raise errors.NotFoundError(f"no program {request.argv[0]!r} in the guest") from None
        streams.close_child()
        given: asyncio.Queue[bytes] = asyncio.Queue()
        listener = asyncio.ensure_future(_listen(process, streams, receive, given))
        feeder = asyncio.ensure_future(_feed_all(streams, given, send))
        try:
            await asyncio.gather(*(_pump(fd, tag, send) for tag, fd in streams.outputs))
            status = await process.wait()
        finally:
            _kill(process)
            listener.cancel()
            feeder.cancel()
            await asyncio.wait([listener, feeder])
    signal_number = -status if status < 0 else 0
    return resources.ExecEnd(exit_status=128 - status if status < 0 else status, signal=signal_number)


@dataclasses.dataclass
class _Streams:
    child_in: int
    child_out: int
    child_err: int
    input: int
    outputs: list[tuple[int, int]]
    is_tty: bool

    def close_child(self) -> None:
        for fd in {self.child_in, self.child_out, self.child_err}:
            os.close(fd)

    def take_terminal(self) -> None:
        os.setsid()
        fcntl.ioctl(self.child_in, termios.TIOCSCTTY, 0)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def end_input(self) -> None:
        if self.is_tty:
            os.write(self.input, b"\x04")
        else:
            os.close(self.input)
        self.input = -1


@contextlib.contextmanager
def _streams(request: resources.ExecRequest) -> Iterator[_Streams]:
    if request.tty:
        parent, child = pty.openpty()
        made = _Streams(child, child, child, parent, [(1, parent)], True)
        made.resize(request.rows, request.cols)
    else:
        (in_r, in_w), (out_r, out_w), (err_r, err_w) = os.pipe(), os.pipe(), os.pipe()
        made = _Streams(in_r, out_w, err_w, in_w, [(1, out_r), (2, err_r)], False)
    try:
        yield made
    finally:
        for fd in {made.input, *(fd for _, fd in made.outputs)} - {-1}:
            with contextlib.suppress(OSError):
                os.close(fd)


async def _listen(
    process: asyncio.subprocess.Process, streams: _Streams, receive: Receive, given: asyncio.Queue[bytes]
) -> None:
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            _kill(process)
            return
        if message.get("bytes") is not None:
            given.put_nowait(message["bytes"])
            continue
        control = msgspec.json.decode(message["text"], type=resources.ExecControl)
        if control.resize is not None and streams.is_tty:
            streams.resize(*control.resize)
        if control.signal:
            os.killpg(process.pid, control.signal)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _feed_all(streams: _Streams, given: asyncio.Queue[bytes], send: Send) -> None:
    """Our clients keep to their window."""
    while True:
        data = await given.get()
        await _feed(streams, data)
        if data:
            taken = resources.ExecNotice(taken=len(data))
            await send({"type": "websocket.send", "text": msgspec.json.encode(taken).decode()})


async def _feed(streams: _Streams, data: bytes) -> None:
    if not data:
        streams.end_input()
        return
    view = memoryview(data)
    with contextlib.suppress(BrokenPipeError):
        while view:
            written = await asyncio.to_thread(os.write, streams.input, view)
            view = view[written:]


async def _pump(fd: int, tag: int, send: Send) -> None:
    async for data in _chunks(fd):
        await send({"type": "websocket.send", "bytes": bytes([tag]) + data})


async def _chunks(fd: int) -> AsyncIterator[bytes]:
    while True:
        try:
            data = await asyncio.to_thread(os.read, fd, 1 << 16)
        except OSError:  # EIO: the last holder of the pty's other side has gone
            return
        if not data:
            return
        yield data
