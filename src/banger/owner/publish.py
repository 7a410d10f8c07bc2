# SPDX-License-Identifier: MIT
"""Listens on the host for ports of guests and carries what comes: straight to a guest with network, else by
its agent. Bounded in connections, and in how long a silent UDP client is remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from banger import steps
from banger.contract import errors, guest, names, ports
from banger.net import carry, tcp_server
from banger.owner import guest as guests
from banger.vm import record

_log = logging.getLogger(__name__)

_ANY: Final = "0.0.0.0"  # noqa: S104 - to know it by, not to bind it
_CONNECT_S: Final = 10.0
_MAX_CONNECTIONS: Final = 512
_MAX_UDP_CLIENTS: Final = 256
_UDP_IDLE_S: Final = 60.0
_UDP_QUEUE: Final = 64
_UDP_UNSENT_BYTES: Final = 256 * 1024


@dataclass(slots=True)
class _Port:
    publish: ports.Publish
    socket: socket.socket
    vm: str
    """The name of whose it is: while its ports are taken, it keeps that."""
    close: Callable[[], Awaitable[None]] | None = None
    """Set while it is served."""


@dataclass(slots=True)
class _Target:
    """A port of a guest. `address` is empty when only the agent reaches it."""

    address: str
    port: int
    protocol: str
    client: guests.GuestClient


class Publisher:
    """Meets the capability's Publisher."""

    def __init__(
        self, network: ipaddress.IPv4Network, connect: Callable[[names.VmId], guests.GuestClient]
    ) -> None:
        self._network = network
        self._connect = connect
        self._ports: dict[names.VmId, list[_Port]] = {}
        self._refused: dict[names.VmId, dict[ports.Publish, str]] = {}
        """What a row has published and could not be opened, with why; it is tried again, by `PortKeeper`."""

    def require_free(self, publish: ports.Publish) -> None:
        """Raises AlreadyExistsError, which says what VM has the port, or BadRequestError."""
        self._bound(publish).close()

    def take(self, vm: record.VmRecord) -> None:
        """Raises AlreadyExistsError for a port that is in use, and takes none then.

        One that was refused to a VM that runs is left to whoever tries again.
        """
        held = {port.publish for port in self._ports.get(vm.id, ())} | self._refused.get(vm.id, {}).keys()
        fresh: list[_Port] = []
        try:
            for publish in ports.parse_all(vm.publish):
                if publish not in held:
                    fresh.append(_Port(publish, self._bound(publish), vm.name))
        except BaseException:
            for port in fresh:
                port.socket.close()
            raise
        if fresh:
            self._ports.setdefault(vm.id, []).extend(fresh)

    async def serve(self, vm: record.VmRecord) -> None:
        """Those of the row, and no others; what is served already goes on.

        Raises AlreadyExistsError for a port that is in use; what was served before is served on then.
        """
        wanted = set(ports.parse_all(vm.publish))
        held = list(self._ports.get(vm.id, ()))
        unwanted = [each for each in held if each.publish not in wanted]
        in_the_way = [each for each in unwanted if any(_clash(each.publish, other) for other in wanted)]
        await self._drop(vm.id, in_the_way)
        try:
            self.take(vm)
            await self._open_all(vm)
        except BaseException:
            fresh = [each for each in self._ports.get(vm.id, ()) if each not in held]
            await steps.finish(self._put_back(vm, fresh, in_the_way))
            raise
        await self._drop(vm.id, [each for each in unwanted if each not in in_the_way])
        refused = self._refused.pop(vm.id, {})
        self._refused[vm.id] = {each: why for each, why in refused.items() if each in wanted}

    async def mend(self, vm: record.VmRecord) -> None:
        """As the row of one that runs wants it. A port that cannot be opened keeps no other."""
        wanted = ports.parse_all(vm.publish)
        await self._drop(vm.id, [each for each in self._ports.get(vm.id, ()) if each.publish not in wanted])
        for each in self.unserved(vm):
            await self._serve_one(vm, each)

    def served(self, vm: record.VmRecord) -> list[ports.Publish]:
        """Of what the row has published: where this host listens."""
        return [each for each in ports.parse_all(vm.publish) if each in self._served(vm.id)]

    def unserved(self, vm: record.VmRecord) -> dict[ports.Publish, str]:
        """Of what the row has published: where this host does not listen, each with why."""
        served = self._served(vm.id)
        why = self._refused.get(vm.id, {})
        return {
            each: why.get(each, "it is about to be opened or closed")
            for each in ports.parse_all(vm.publish)
            if each not in served
        }

    def is_as(self, vm_id: names.VmId, vm: record.VmRecord | None) -> bool:
        """Whether all that the row wants is served, and nothing else is held; None wants nothing."""
        wanted = set(ports.parse_all(vm.publish)) if vm is not None else set()
        held = {each.publish for each in self._ports.get(vm_id, ())}
        return wanted == held == self._served(vm_id)

    def holders(self) -> list[names.VmId]:
        """Who has any port."""
        return [vm_id for vm_id, some in self._ports.items() if some]

    async def release(self, vm_id: names.VmId) -> None:
        """All of them, also when whoever asks is cancelled: nobody would know of the rest any more."""
        self._refused.pop(vm_id, None)
        await steps.finish(_end_all(self._ports.pop(vm_id, [])))

    async def close(self) -> None:
        for vm_id in list(self._ports):
            await self.release(vm_id)

    async def _serve_one(self, vm: record.VmRecord, publish: ports.Publish) -> None:
        """One that cannot be is logged, the first time."""
        refused = self._refused.setdefault(vm.id, {})
        try:
            port = _Port(publish, self._bound(publish), vm.name)
            self._ports.setdefault(vm.id, []).append(port)
            await self._open(vm, port)
        except (errors.BangerError, OSError) as error:
            level = logging.DEBUG if publish in refused else logging.ERROR
            _log.log(level, "a port is no longer published", extra={"vm": vm.id, "error": str(error)})
            refused[publish] = str(error)
            await self._drop(vm.id, self._held(vm.id, publish))
            return
        if refused.pop(publish, None) is not None:
            _log.info("a port is published again", extra={"vm": vm.id, "port": publish.place})

    def _served(self, vm_id: names.VmId) -> set[ports.Publish]:
        return {port.publish for port in self._ports.get(vm_id, ()) if port.close is not None}

    def _held(self, vm_id: names.VmId, publish: ports.Publish) -> list[_Port]:
        return [each for each in self._ports.get(vm_id, ()) if each.publish == publish]

    def _bound(self, publish: ports.Publish) -> socket.socket:
        try:
            return bound(publish)
        except errors.AlreadyExistsError:
            held = (port for some in self._ports.values() for port in some)
            holder = next((port for port in held if _excludes(port.publish, publish)), None)
            if holder is None:
                raise
        raise errors.AlreadyExistsError(
            f"port {publish.place} of this host is published by {holder.vm} already",
            hint="choose another port, or take that one back: "
            f"`banger vm unpublish {holder.vm} {holder.publish}`",
        )

    async def _drop(self, vm_id: names.VmId, some: Iterable[_Port]) -> None:
        for port in some:
            self._ports[vm_id].remove(port)
            await _end(port)

    async def _put_back(self, vm: record.VmRecord, fresh: Iterable[_Port], ended: Iterable[_Port]) -> None:
        await self._drop(vm.id, fresh)
        for each in ended:
            await self._serve_one(vm, each.publish)

    async def _open_all(self, vm: record.VmRecord) -> None:
        for port in self._ports.get(vm.id, ()):
            if port.close is None:
                await self._open(vm, port)

    async def _open(self, vm: record.VmRecord, port: _Port) -> None:
        address = str(names.guest_address(self._network, vm.slot)) if vm.network else ""
        target = _Target(address, port.publish.guest_port, port.publish.protocol, self._connect(vm.id))
        if port.publish.protocol == "udp":
            loop = asyncio.get_running_loop()
            _, protocol = await loop.create_datagram_endpoint(lambda: _Udp(target), sock=port.socket)
            port.close = protocol.close
            return

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                with carry.reset_on_failure(writer):
                    await _carry_tcp(target, reader, writer)
            except (OSError, errors.BangerError, TimeoutError) as error:
                _log.debug(
                    "published connection ended", extra={"port": port.publish.place, "error": str(error)}
                )

        server = tcp_server.TcpServer(serve, most=_MAX_CONNECTIONS, limit=carry.CHUNK)
        server.start(port.socket)
        port.close = server.close


def bound(publish: ports.Publish) -> socket.socket:
    """Raises AlreadyExistsError when the port is in use, BadRequestError for an address that is not ours."""
    kind = socket.SOCK_DGRAM if publish.protocol == "udp" else socket.SOCK_STREAM
    made = socket.socket(socket.AF_INET, kind)
    try:
        made.setblocking(False)
        if kind is socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((publish.address, publish.host_port))
        if kind is socket.SOCK_STREAM:
            made.listen(128)  # SO_REUSEADDR lets two bind; only one of them may listen
            return made
    except OSError as error:
        made.close()
        raise _refused(publish, error) from None
    return made


def _clash(one: ports.Publish, other: ports.Publish) -> bool:
    """While the one is bound, the other may be refused: an address may stand for all of them."""
    return (one.host_port, one.protocol) == (other.host_port, other.protocol)


def _excludes(one: ports.Publish, other: ports.Publish) -> bool:
    """Whether they cannot both be bound."""
    return _clash(one, other) and (one.address == other.address or _ANY in (one.address, other.address))


def _refused(publish: ports.Publish, error: OSError) -> errors.BangerError:
    if isinstance(error, PermissionError):
        hint = "ports below 1024 are root's; choose a higher one"
        return errors.BadRequestError(f"port {publish.place} of this host may not be used", hint=hint)
    text = f"port {publish.place} of this host cannot be published: {error.strerror}"
    return errors.AlreadyExistsError(text, hint="choose another port, or end what uses this one")


async def _end_all(some: Iterable[_Port]) -> None:
    for port in some:
        await _end(port)


async def _end(port: _Port) -> None:
    if port.close is None:
        port.socket.close()
    else:
        await port.close()


# --- TCP ---


async def _carry_tcp(target: _Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if target.address:
        async with asyncio.timeout(_CONNECT_S):
            there, back = await asyncio.open_connection(target.address, target.port, limit=carry.CHUNK)
        touch = target.client.activity.touch
        with carry.reset_on_failure(back):
            await carry.both(carry.pump(reader, back, touch), carry.pump(there, writer, touch))
            await carry.closed(back)
        return
    async with target.client.connect(guest.ConnectSpec(port=target.port)) as tunnel:
        await carry.both(_into(reader, tunnel), _out_of(tunnel, writer))


async def _into(reader: asyncio.StreamReader, tunnel: guests.Tunnel) -> None:
    while data := await reader.read(carry.CHUNK):
        await tunnel.write(data)
    await tunnel.end()


async def _out_of(tunnel: guests.Tunnel, writer: asyncio.StreamWriter) -> None:
    while data := await tunnel.read():
        writer.write(data)
        await writer.drain()
    writer.write_eof()


# --- UDP ---


class _Udp(asyncio.DatagramProtocol):
    """One way to the guest for each client, forgotten when it is silent."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: dict[tuple[str, int], asyncio.Queue[bytes]] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # asyncio gives a datagram endpoint such a one

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._target.client.activity.touch()
        queue = self._clients.get(addr)
        if queue is None:
            if len(self._clients) >= _MAX_UDP_CLIENTS:
                return
            queue = self._clients[addr] = asyncio.Queue(_UDP_QUEUE)
            task = asyncio.create_task(self._serve(addr, queue))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(asyncio.QueueFull):  # as a network would: dropped
            queue.put_nowait(data)

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reply(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            _send(self._transport, data, addr)

    async def _serve(self, addr: tuple[str, int], queue: asyncio.Queue[bytes]) -> None:
        try:
            if self._target.address:
                await self._straight(addr, queue)
            else:
                await self._by_agent(addr, queue)
        except (OSError, errors.BangerError) as error:
            _log.debug("published datagrams ended", extra={"error": str(error)})
        finally:
            self._clients.pop(addr, None)

    async def _straight(self, addr: tuple[str, int], queue: asyncio.Queue[bytes]) -> None:
        loop = asyncio.get_running_loop()
        async with _remembered() as idle:

            def answer(data: bytes) -> None:
                _put_off(idle)
                self._reply(data, addr)

            transport, _ = await loop.create_datagram_endpoint(
                lambda: _Answers(answer), remote_addr=(self._target.address, self._target.port)
            )
            try:
                while True:
                    _send(transport, await queue.get())
                    _put_off(idle)
            finally:
                transport.close()

    async def _by_agent(self, addr: tuple[str, int], queue: asyncio.Queue[bytes]) -> None:
        spec = guest.ConnectSpec(port=self._target.port, protocol="udp")
        async with self._target.client.connect(spec) as tunnel, _remembered() as idle:

            async def answers() -> None:
                while data := await tunnel.read():
                    _put_off(idle)
                    self._reply(data, addr)

            answering = asyncio.create_task(answers())
            try:
                while True:
                    await tunnel.write(await queue.get())
                    _put_off(idle)
            finally:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)


@contextlib.asynccontextmanager
async def _remembered() -> AsyncIterator[asyncio.Timeout]:
    """Until neither side has said anything for a while; each of them puts that off."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_UDP_IDLE_S) as idle:
            yield idle


def _put_off(idle: asyncio.Timeout) -> None:
    if not idle.expired():
        idle.reschedule(asyncio.get_running_loop().time() + _UDP_IDLE_S)


def _send(transport: asyncio.DatagramTransport, data: bytes, addr: tuple[str, int] | None = None) -> None:
    """asyncio keeps what the kernel does not take, without end: dropped, as a network would."""
    if transport.get_write_buffer_size() < _UDP_UNSENT_BYTES:  # type: ignore[attr-defined] # asyncio has it
        transport.sendto(data, addr)


class _Answers(asyncio.DatagramProtocol):
    def __init__(self, reply: Callable[[bytes], None]) -> None:
        self._reply = reply

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._reply(data)
