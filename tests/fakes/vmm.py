# SPDX-License-Identifier: MIT
"""A VMM without a machine: real API and vsock sockets, Firecracker's handshake, an agent that answers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from banger.contract import guest

_pids = itertools.count(1_000_000)
F = guest.FrameType
T = guest.Tag
# asyncio takes a few turns of its loop from accepting a connection to serving it.
_TURNS = 10


@dataclass(slots=True)
class Behaviour:
    """How the next VMMs behave."""

    silent: bool = False
    """Nobody ever answers in the guest."""
    is_old: bool = False
    """The agent has no port for pulses."""
    hangs: bool = False
    """Connections are taken, and nothing is ever said on them."""
    panic: str = ""
    """The guest's kernel panics with this reason instead of coming up."""
    ignores_power_off: bool = False
    clock_off_ns: int = 0
    """How far the guest's clock is from the host's when it has booted."""
    keeps_its_clock: bool = False
    """The agent lets nobody set it."""
    late_service: int = 0
    """So many connections find nobody listening in the guest."""
    answers: bytes | None = None
    """The agent answers every request with these bytes."""
    agent: Path | None = None
    """Socket of a real agent, which gets what concerns commands and files."""
    on_put: Callable[[], Awaitable[object]] | None = None
    """Awaited before files are taken."""
    on_agent: Callable[[guest.FrameType, str], Awaitable[object]] | None = None
    """Awaited `before` and `after` the agent does what it is asked."""


class FakeVmm:
    """Exec runs nothing: it echoes stdin to stdout, and `exit N` ends with N, `deaf` takes no input."""

    def __init__(self, api: Path, vsock: Path, console: Path, behaviour: Behaviour) -> None:
        self.pid = next(_pids)
        self.boot_id = str(uuid.uuid4())
        self.flushes = 0
        self.flushes_before_power_off = 0
        self.knocks = 0
        self.clock_off_ns = behaviour.clock_off_ns
        self.clock_asked = 0
        self.clock_sets = 0
        self.clock_was_set = asyncio.Event()
        self._paths = (api, vsock)
        self._console = console
        self._log = console.with_name("vmm.log")
        self._behaviour = behaviour
        self._servers: list[asyncio.Server] = []
        self._ending: asyncio.Task[None] | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.answering: set[asyncio.Task[object]] = set()
        self.is_running = False

    async def start(self) -> None:
        api, vsock = self._paths
        for path in (*self._paths, self._log):
            path.unlink(missing_ok=True)
        self._servers = []
        try:
            self._servers.append(await asyncio.start_unix_server(self._serve_api, str(api)))
            self._servers.append(await asyncio.start_unix_server(self._serve_vsock, str(vsock)))
        except BaseException:
            await self.kill()
            raise
        self.is_running = True
        if self._behaviour.panic:
            self._console.write_text(f"[    1.0] Kernel panic - not syncing: {self._behaviour.panic}\n")
            asyncio.get_running_loop().call_later(0.01, self._die)

    async def kill(self) -> None:
        """Returns when every connection is closed, also one that was accepted just before."""
        self._die()
        if self._ending is not None:
            await self._ending
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        for writer in list(self._writers):
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _go_down(self) -> None:
        """As Firecracker says it, whoever asked for it."""
        if self.is_running:
            self._console.parent.mkdir(parents=True, exist_ok=True)
            self._log.write_text("Firecracker exiting successfully. exit_code=0\n")
        self._die()

    def _die(self) -> None:
        self.is_running = False
        servers, self._servers = self._servers, []
        for server in servers:
            for listener in server.sockets:
                server.get_loop().remove_reader(listener)
        if servers:
            self._ending = asyncio.create_task(_close(servers))
        for path in self._paths:
            path.unlink(missing_ok=True)
        for writer in list(self._writers):
            writer.transport.abort()

    def _has(self, writer: asyncio.StreamWriter) -> bool:
        """Whether it is served: who was accepted just before the VMM died is cut off as well."""
        if not self.is_running:
            writer.transport.abort()
            return False
        self._writers.add(writer)
        return True

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
    ) -> None:
        """The client has had its greeting already; ours is for the agent alone."""
        inside, outside = await asyncio.open_unix_connection(str(self._behaviour.agent))
        self._writers.add(outside)
        try:
            outside.write(guest.hello() + request)
            await _receive(inside)
            await asyncio.gather(_pump(reader, outside), _pump(inside, writer))
        finally:
            self._writers.discard(outside)
            outside.close()

    async def _serve_api(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._has(writer):
            return
        with contextlib.suppress(OSError):
            await reader.read()
        self._writers.discard(writer)
        writer.close()

    async def _serve_vsock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._has(writer):
            return
        try:
            line = await reader.readline()
            if self._behaviour.hangs:
                await reader.read()
                return
            nobody = self._behaviour.silent or self._behaviour.panic
            if line == b"CONNECT 1023\n" and not nobody:
                writer.write(b"OK 1073741824\n")
                await self._agent(reader, writer)
            elif line == b"CONNECT 1021\n" and not nobody and not self._behaviour.is_old:
                writer.write(b"OK 1073741825\n")
                await self._pulse(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pulse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while byte := await reader.read(1):
            if not self._behaviour.silent:
                writer.write(byte)

    async def _agent(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind, _ = await _receive(reader)
        assert kind == F.HELLO, kind
        if self._behaviour.answers is not None:
            writer.write(self._behaviour.answers)
            return
        greeting = guest.encode([(T.MAGIC, guest.MAGIC), (T.BOOT_ID, self.boot_id)])
        writer.write(guest.frame(F.HELLO, greeting))
        kind, payload = await _receive(reader)
        told = self._behaviour.on_agent or _nobody
        asking = asyncio.current_task()
        assert asking is not None
        self.answering.add(asking)
        try:
            await told(F(kind), "before")
            if self.is_running:
                await self._answer(reader, writer, kind, payload)
            await told(F(kind), "after")
        finally:
            self.answering.discard(asking)

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: int, payload: bytes
    ) -> None:
        if self._behaviour.agent is not None and kind in {F.EXEC, F.PUT, F.GET, F.MORE, F.PORTS}:
            if kind == F.PUT and self._behaviour.on_put is not None:
                await self._behaviour.on_put()
            await self._relay(reader, writer, guest.frame(F(kind), payload))
            return
        if kind == F.HEALTH:
            told = [(T.UPTIME_MS, 5), (T.REALTIME_NS, time.time_ns() + self.clock_off_ns)]
            writer.write(guest.frame(F.REPLY, guest.encode(told)))
        elif kind == F.TIME:
            writer.write(self._time(guest.Fields(payload).number(T.REALTIME_NS)))
        elif kind == F.FLUSH:
            self.flushes += 1
            writer.write(guest.frame(F.REPLY))
        elif kind == F.POWER_OFF:
            self.flushes_before_power_off = self.flushes
            writer.write(guest.frame(F.REPLY))
            if not self._behaviour.ignores_power_off:
                asyncio.get_running_loop().call_later(0.005, self._go_down)
        elif kind == F.EXEC:
            await _execute(reader, writer, guest.Fields(payload))
        elif kind == F.CONNECT:
            await self._connect(reader, writer, guest.Fields(payload).number(T.PORT))
        else:
            writer.write(guest.frame(F.ERROR, guest.encode([(T.CODE, "bad_request"), (T.MESSAGE, "no")])))

    def _time(self, wanted_ns: int) -> bytes:
        self.clock_asked += not wanted_ns
        if wanted_ns and self._behaviour.keeps_its_clock:
            return guest.frame(F.ERROR, guest.encode([(T.CODE, "unsupported"), (T.MESSAGE, "not mine")]))
        if wanted_ns:
            self.clock_off_ns = wanted_ns - time.time_ns()
            self.clock_sets += 1
            self.clock_was_set.set()
        return guest.frame(F.REPLY, guest.encode([(T.REALTIME_NS, time.time_ns() + self.clock_off_ns)]))

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        """Port 22 gives back what it gets, once it was asked often enough; port 81 breaks off."""
        self.knocks += 1
        if port not in (22, 81) or self.knocks <= self._behaviour.late_service:
            said = f"nothing listens on port {port} of the guest"
            writer.write(guest.frame(F.ERROR, guest.encode([(T.CODE, "refused"), (T.MESSAGE, said)])))
            return
        writer.write(guest.frame(F.REPLY))
        while port == 22:
            kind, data = await _receive(reader)
            assert kind == F.DATA, kind
            writer.write(guest.frame(F.DATA, data))
            await writer.drain()
            if not data:
                await reader.read()
                return
        await _receive(reader)
        lost = [(T.CODE, "io_error"), (T.MESSAGE, "the connection in the guest was lost")]
        writer.write(guest.frame(F.ERROR, guest.encode(lost)))


async def _close(servers: Sequence[asyncio.Server]) -> None:
    """Once who was accepted is served: Python 3.11 forgets a connection whose server is closed meanwhile."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)
    for server in servers:
        server.close()
        await server.wait_closed()


async def _nobody(_kind: guest.FrameType, _part: str) -> None:
    return


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _execute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: guest.Fields) -> None:
    argv = fields.texts(T.ARGUMENT)
    writer.write(guest.frame(F.STARTED, guest.encode([(T.PID, 2)])))
    code = int(argv[1]) if argv[0] == "exit" else 0
    while argv[0] in {"cat", "deaf"}:
        kind, data = await _receive(reader)
        if kind == F.SIGNAL:
            number = guest.Fields(data).number(T.SIGNAL)
            writer.write(guest.frame(F.EXIT, guest.encode([(T.EXIT_KIND, 1), (T.EXIT_CODE, number)])))
            return
        if kind != F.STDIN or argv[0] == "deaf":
            continue
        if not data:
            break
        writer.write(guest.frame(F.STDOUT, data))
        writer.write(guest.frame(F.WINDOW, guest.encode([(T.COUNT, len(data))])))
        await writer.drain()
    writer.write(guest.frame(F.EXIT, guest.encode([(T.EXIT_KIND, 0), (T.EXIT_CODE, code)])))


async def _receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind, size = guest.parse_header(await reader.readexactly(guest.HEADER.size))
    return kind, await reader.readexactly(size)
