# SPDX-License-Identifier: MIT
"""The daemon's only door to a guest: its agent, over vsock. One connection is one request.

Whatever is on the other side may be hostile: frames are bounded, every wait has a deadline, and nothing it
says is believed beyond being shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from banger.contract import errors, guest, names


class Activity(Protocol):
    """Hears what is done in the guest for somebody; not what the daemon asks for itself."""

    def touch(self) -> None: ...

    def busy(self) -> contextlib.AbstractContextManager[None]: ...


class _Unheard:
    def touch(self) -> None:
        return

    def busy(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connector = Callable[[], Awaitable[Stream]]

_REPLY_S: Final = 10.0
_CONNECT_PORT_S: Final = 15.0
"""Longer than the agent itself tries."""
_STALL_S: Final = 60.0
"""How long a file transfer may stand still."""
_MAX_LISTENERS: Final = 4096
_FRAMES_AT_ONCE: Final = 64
_CONNECT_S: Final = 20.0
"""Firecracker answers a connection at once, and the agent when it comes to it: a busy host needs seconds."""
_SUN_PATH_BYTES: Final = 107
_ACCEPTED: Final = b"OK "
_LINE_BYTES: Final = 64


def vsock_connector(socket: Path, port: int = names.AGENT_PORT) -> Connector:
    """Connects through Firecracker's vsock socket: `CONNECT <port>`, answered by `OK <its port>`.

    Source: firecracker, docs/vsock.md. Raises UnavailableError while nobody listens in the guest.
    """

    async def connect() -> Stream:
        try:
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await _open(socket)
                try:
                    writer.write(f"CONNECT {port}\n".encode())
                    line = await reader.readuntil(b"\n")
                except BaseException:
                    writer.close()
                    raise
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError) as error:
            if (ours := errors.exhausted(error)) is not None:
                raise ours from error
            raise errors.UnavailableError(f"the guest's agent does not answer: {_reason(error)}") from error
        if not line.startswith(_ACCEPTED) or len(line) > _LINE_BYTES:
            writer.close()
            raise errors.ProtocolError("the VMM's vsock socket does not speak as Firecracker's")
        return reader, writer

    return connect


async def _open(socket: Path) -> Stream:
    """A path too long for a socket address is reached through its directory's descriptor."""
    if len(os.fsencode(socket)) <= _SUN_PATH_BYTES:
        return await asyncio.open_unix_connection(str(socket), limit=guest.MAX_PAYLOAD_BYTES * 2)
    directory = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{directory}/{socket.name}"
        return await asyncio.open_unix_connection(short, limit=guest.MAX_PAYLOAD_BYTES * 2)
    finally:
        os.close(directory)


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_CONNECT_S:g} s"
    return str(error) or "the connection was closed"


class GuestClient:
    """Requests to one guest's agent. Every method opens a connection of its own."""

    def __init__(self, connect: Connector, activity: Activity | None = None) -> None:
        self._connect = connect
        self.activity = activity or _Unheard()

    async def health(self) -> guest.Health:
        greeting, payload = await self._ask(guest.FrameType.HEALTH, b"")
        return guest.parse_health(payload, greeting)

    async def flush(self, *, deadline_s: float) -> None:
        """The guest's file systems are on its disks."""
        await self._ask(guest.FrameType.FLUSH, b"", deadline_s=deadline_s)

    async def power_off(self, *, grace_ms: int) -> None:
        """Answers before it happens; wait for the VMM to end."""
        await self._ask(guest.FrameType.POWER_OFF, guest.encode([(guest.Tag.GRACE_MS, grace_ms)]))

    async def set_time(self, realtime_ns: int) -> None:
        await self._ask(guest.FrameType.TIME, guest.encode([(guest.Tag.REALTIME_NS, realtime_ns)]))

    async def time_ns(self) -> int:
        """The guest's clock."""
        _, payload = await self._ask(guest.FrameType.TIME, b"")
        return guest.Fields(payload).number(guest.Tag.REALTIME_NS)

    async def ports(self) -> list[guest.Listener]:
        """The guest's listening sockets."""
        found: list[guest.Listener] = []
        async with _deadline("ports", _REPLY_S), self._request(guest.FrameType.PORTS, b"") as link:
            while True:
                kind, payload = await link.receive()
                if kind == guest.FrameType.REPLY:
                    return found
                if kind != guest.FrameType.ENTRY or len(found) >= _MAX_LISTENERS:
                    raise _refusal(kind, payload)
                found.append(guest.parse_listener(payload))

    async def put(self, spec: guest.PutSpec, archive: AsyncIterable[bytes]) -> guest.Transferred:
        """Unpacks a tar archive in the guest. What it refuses stays partly unpacked."""
        request = self._request(guest.FrameType.PUT, guest.put_payload(spec))
        with self.activity.busy():
            async with request as link:
                return await self._put(link, archive)

    async def _put(self, link: _Link, archive: AsyncIterable[bytes]) -> guest.Transferred:
        sending = asyncio.create_task(_send_archive(link, archive))
        try:
            # An early answer is a refusal, and then nobody reads what is still to be sent.
            answering = asyncio.create_task(link.expect(guest.FrameType.REPLY))
            try:
                await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done() and not answering.done():
                    sending.result()
                async with _deadline("put", _STALL_S):
                    return guest.parse_transferred(await answering)
            finally:
                await _end(answering)
        finally:
            await _end(sending)

    @asynccontextmanager
    async def get(self, spec: guest.GetSpec) -> AsyncIterator[Archive]:
        """A tar archive of a path."""
        with self.activity.busy():
            async with self._request(guest.FrameType.GET, guest.get_payload(spec)) as link:
                yield Archive(link)

    @asynccontextmanager
    async def exec(self, spec: guest.ExecSpec, *, stdin: bool = True) -> AsyncIterator[Exec]:
        """A running command; leaving the block before its end hangs it up."""
        self.activity.touch()
        # A terminal that was left open is no use of it; what is typed and shown is.
        with contextlib.nullcontext() if spec.tty else self.activity.busy():
            async with self._request(guest.FrameType.EXEC, guest.exec_payload(spec, stdin=stdin)) as link:
                yield Exec(link, self.activity.touch)

    @asynccontextmanager
    async def connect(self, spec: guest.ConnectSpec) -> AsyncIterator[Tunnel]:
        """A connection to a port of the guest, closed with the block.

        Raises RefusedError when nobody listens there.
        """
        async with self._request(guest.FrameType.CONNECT, guest.connect_payload(spec)) as link:
            async with _deadline("connect", _CONNECT_PORT_S):
                await link.expect(guest.FrameType.REPLY)
            self.activity.touch()
            yield Tunnel(link, self.activity.touch)

    async def _ask(
        self, kind: guest.FrameType, payload: bytes, *, deadline_s: float | None = None
    ) -> tuple[guest.Fields, bytes]:
        limit_s = _REPLY_S if deadline_s is None else deadline_s
        async with _deadline(kind.name.lower(), limit_s), self._request(kind, payload) as link:
            return link.greeting, await link.expect(guest.FrameType.REPLY)

    @asynccontextmanager
    async def _request(self, kind: guest.FrameType, payload: bytes) -> AsyncIterator[_Link]:
        reader, writer = await self._connect()
        try:
            writer.write(guest.hello() + guest.request(kind, payload))
            yield await _greeted(reader, writer)
        finally:
            # Closing would wait for a guest that reads nothing to take what is still to be sent.
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@dataclass(slots=True)
class _Link:
    """One connection after the agent's hello."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    greeting: guest.Fields
    _count: int = 0

    async def receive(self) -> tuple[int, bytes]:
        """Frames that are here already are taken without waiting: thousands of small ones would hold all
        that the daemon does."""
        self._count += 1
        if self._count % _FRAMES_AT_ONCE == 0:
            await asyncio.sleep(0)
        return await _receive(self.reader)

    async def expect(self, wanted: guest.FrameType) -> bytes:
        kind, payload = await self.receive()
        if kind != wanted:
            raise _refusal(kind, payload)
        return payload


def _refusal(kind: int, payload: bytes) -> errors.BangerError:
    """What an unwanted frame means."""
    if kind == guest.FrameType.ERROR:
        return guest.parse_error(payload)
    return errors.ProtocolError(f"the guest's agent sent frame {kind:#x} out of turn")


@asynccontextmanager
async def _deadline(what: str, deadline_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError:
        message = f"the guest's agent did not finish {what} within {deadline_s:g} s"
        raise errors.DeadlineError(message) from None


async def _end(task: asyncio.Task[Any]) -> None:
    """The task is over and what it raised has been looked at."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _send_archive(link: _Link, archive: AsyncIterable[bytes]) -> None:
    """Lost connections are left to the reader of the answer, which knows the reason."""
    with contextlib.suppress(ConnectionError):
        async for piece in archive:
            view = memoryview(piece)
            while view:
                link.writer.write(guest.frame(guest.FrameType.DATA, bytes(view[: guest.MAX_PAYLOAD_BYTES])))
                view = view[guest.MAX_PAYLOAD_BYTES :]
                async with _deadline("put", _STALL_S):
                    await link.writer.drain()
        link.writer.write(guest.frame(guest.FrameType.DATA))
        async with _deadline("put", _STALL_S):
            await link.writer.drain()


class Archive:
    """Comes in pieces. Only one that is read to its end is whole, and `done` says then what it held."""

    def __init__(self, link: _Link) -> None:
        self._link = link
        self.done = guest.Transferred(0, 0)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            async with _deadline("get", _STALL_S):
                kind, payload = await self._link.receive()
            if kind != guest.FrameType.DATA:
                raise _refusal(kind, payload)
            if not payload:
                break
            yield payload
        async with _deadline("get", _STALL_S):
            self.done = guest.parse_transferred(await self._link.expect(guest.FrameType.REPLY))


async def _greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Link:
    try:
        async with asyncio.timeout(_REPLY_S):
            kind, payload = await _receive(reader)
    except TimeoutError:
        raise errors.DeadlineError(f"the guest's agent said no hello within {_REPLY_S:g} s") from None
    if kind == guest.FrameType.ERROR:
        raise guest.parse_error(payload)
    greeting = guest.Fields(payload)
    if kind != guest.FrameType.HELLO or greeting.text(guest.Tag.MAGIC).encode() != guest.MAGIC:
        raise errors.ProtocolError("what answers in the guest is not banger's agent")
    return _Link(reader, writer, greeting)


def _closed() -> errors.UnavailableError:
    hint = "its VM was stopped or reset, or its guest ends: `banger vm explain NAME` says which"
    return errors.UnavailableError("the guest's agent closed the connection", hint=hint)


async def _receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    try:
        kind, size = guest.parse_header(await reader.readexactly(guest.HEADER.size))
        return kind, await reader.readexactly(size)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise _closed() from error


_STREAMS: Final = {int(guest.FrameType.STDOUT): 1, int(guest.FrameType.STDERR): 2}


class Exec:
    """A command that runs in the guest. One task writes, one reads."""

    def __init__(self, link: _Link, touch: Callable[[], None]) -> None:
        self._link = link
        self._touch = touch
        self._credit = guest.STDIN_WINDOW_BYTES
        self._granted = asyncio.Event()
        self._ended = False

    async def output(self) -> AsyncIterator[tuple[int, bytes] | guest.ExitStatus]:
        """`(1 or 2, data)` for stdout and stderr, at the end the exit status.

        Raises the agent's error, or UnavailableError when the guest goes away before that.
        """
        open_streams, has_started = {1, 2}, False
        try:
            while True:
                kind, payload = await self._link.receive()
                self._touch()
                if kind in _STREAMS:
                    stream = _STREAMS[kind]
                    if stream not in open_streams:
                        raise errors.ProtocolError("the guest's agent went on after the end of its output")
                    if payload:
                        yield stream, payload
                    else:
                        open_streams.remove(stream)
                elif kind == guest.FrameType.WINDOW:
                    self._grant(guest.Fields(payload).number(guest.Tag.COUNT))
                elif kind == guest.FrameType.EXIT:
                    yield guest.parse_exit(payload)
                    return
                elif kind == guest.FrameType.STARTED and not has_started:
                    has_started = True
                else:
                    raise _refusal(kind, payload)
        finally:
            self._ended = True
            self._granted.set()

    def _grant(self, count: int) -> None:
        if not 0 < count <= guest.STDIN_WINDOW_BYTES - self._credit:
            raise errors.ProtocolError("the guest's agent gave back input that it was not sent")
        self._credit += count
        self._granted.set()

    async def write(self, data: bytes) -> None:
        """Sends stdin, waiting while the command does not read; drops it once the command has ended."""
        self._touch()
        view = memoryview(data)
        while view and not self._ended:
            if self._credit == 0:
                self._granted.clear()
                await self._granted.wait()
                continue
            size = min(len(view), self._credit, guest.MAX_PAYLOAD_BYTES)
            self._credit -= size
            await self._send(guest.FrameType.STDIN, bytes(view[:size]))
            view = view[size:]

    async def close_stdin(self) -> None:
        await self._send(guest.FrameType.STDIN, b"")

    async def resize(self, rows: int, cols: int) -> None:
        fields: list[tuple[guest.Tag, guest.Value]] = [(guest.Tag.ROWS, rows), (guest.Tag.COLUMNS, cols)]
        await self._send(guest.FrameType.RESIZE, guest.encode(fields))

    async def signal(self, number: int) -> None:
        await self._send(guest.FrameType.SIGNAL, guest.encode([(guest.Tag.SIGNAL, number)]))

    async def _send(self, kind: guest.FrameType, payload: bytes) -> None:
        """A command that has ended hears nothing any more; that is no error."""
        with contextlib.suppress(OSError):
            self._link.writer.write(guest.frame(kind, payload))
            await self._link.writer.drain()


class Tunnel:
    """A connection to a port of the guest. One task writes, one reads; with `udp` a piece is a datagram."""

    def __init__(self, link: _Link, touch: Callable[[], None]) -> None:
        self._link = link
        self._touch = touch

    async def read(self) -> bytes:
        """The next piece; empty when the guest's side has ended.

        Raises the agent's error when the connection in the guest was lost.
        """
        kind, payload = await self._link.receive()
        if kind != guest.FrameType.DATA:
            raise _refusal(kind, payload)
        self._touch()
        return payload

    async def write(self, data: bytes) -> None:
        """Waits while the guest takes nothing. Raises UnavailableError when the agent is gone."""
        self._touch()
        view = memoryview(data)
        while view:
            await self._send(bytes(view[: guest.MAX_PAYLOAD_BYTES]))
            view = view[guest.MAX_PAYLOAD_BYTES :]

    async def end(self) -> None:
        """Our side is over; the guest's may go on."""
        await self._send(b"")

    async def _send(self, data: bytes) -> None:
        try:
            self._link.writer.write(guest.frame(guest.FrameType.DATA, data))
            await self._link.writer.drain()
        except OSError as error:
            raise _closed() from error
