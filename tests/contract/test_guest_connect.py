# SPDX-License-Identifier: MIT
"""Connections to ports of the guest, through the real agent and the daemon's own client."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from banger.contract import errors, guest
from banger.owner import guest as guests
from tests.contract import agent

MIB = 1 << 20
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module", params=agent.KINDS)
def agent_socket(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A running agent's socket; the agent has the tests' own uid."""
    with agent.running(request.param) as path:
        yield path


@pytest.fixture
def client(agent_socket: Path) -> guests.GuestClient:
    """A client of that agent."""
    return guests.GuestClient(lambda: asyncio.open_unix_connection(str(agent_socket)))


@contextlib.asynccontextmanager
async def service(handle: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """The port of a service on the loopback; all its connections are over after the block."""
    serving: set[asyncio.Task[None]] = set()

    async def handled(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await handle(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(handled(reader, writer)))

    async with await asyncio.start_server(accept, host, 0) as server:
        yield server.sockets[0].getsockname()[1]
    async with asyncio.timeout(30):
        await asyncio.gather(*serving)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def read_all(tunnel: guests.Tunnel) -> bytes:
    pieces = []
    while data := await tunnel.read():
        pieces.append(data)
    return b"".join(pieces)


async def test_bytes_travel_both_ways_and_each_end_is_told(client: guests.GuestClient) -> None:
    async with service(echo) as port, client.connect(guest.ConnectSpec(port)) as tunnel:
        await tunnel.write(b"hello")
        assert await tunnel.read() == b"hello"
        await tunnel.end()
        assert await tunnel.read() == b""


@pytest.mark.timeout(120)
async def test_64_mib_each_way_arrive_intact(client: guests.GuestClient) -> None:
    sent, got, count = hashlib.sha256(), hashlib.sha256(), 0
    piece = os.urandom(MIB)
    async with service(echo) as port, client.connect(guest.ConnectSpec(port)) as tunnel:

        async def feed() -> None:
            for _ in range(64):
                sent.update(piece)
                await tunnel.write(piece)
            await tunnel.end()

        feeding = asyncio.create_task(feed())
        while data := await tunnel.read():
            got.update(data)
            count += len(data)
        await feeding
    assert (count, got.digest()) == (64 * MIB, sent.digest())


async def test_a_service_may_go_on_after_our_end(client: guests.GuestClient) -> None:
    async def answer_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read()
        writer.write(asked[::-1] * 1000)

    async with service(answer_at_the_end) as port, client.connect(guest.ConnectSpec(port)) as tunnel:
        await tunnel.write(b"abc")
        await tunnel.end()
        assert await read_all(tunnel) == b"cba" * 1000


async def test_we_may_go_on_after_the_services_end(client: guests.GuestClient) -> None:
    heard = asyncio.get_running_loop().create_future()

    async def end_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        heard.set_result(await reader.read())

    async with service(end_first) as port, client.connect(guest.ConnectSpec(port)) as tunnel:
        assert await tunnel.read() == b""
        await tunnel.write(b"still here")
        await tunnel.end()
        assert await asyncio.wait_for(heard, 30) == b"still here"


async def test_nobody_listening_is_said_so(client: guests.GuestClient) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(errors.RefusedError, match=str(port)):
            async with client.connect(guest.ConnectSpec(port)):
                pass


async def test_without_an_address_both_loopbacks_are_tried(client: guests.GuestClient) -> None:
    async with service(echo, "::1") as port, client.connect(guest.ConnectSpec(port)) as tunnel:
        await tunnel.write(b"six")
        assert await tunnel.read() == b"six"


@pytest.mark.parametrize(
    "spec",
    [
        guest.ConnectSpec(80, "192.0.2.1"),
        guest.ConnectSpec(80, "2001:db8::1"),
        guest.ConnectSpec(80, "224.0.0.1"),
        guest.ConnectSpec(80, "0.0.0.0"),  # noqa: S104 - the agent must refuse it
        guest.ConnectSpec(80, "localhost"),
        guest.ConnectSpec(0),
        guest.ConnectSpec(65536),
        guest.ConnectSpec(80, protocol="sctp"),
    ],
    ids=str,
)
async def test_only_the_guests_own_addresses_and_ports(
    client: guests.GuestClient, spec: guest.ConnectSpec
) -> None:
    with pytest.raises(errors.BangerError):
        async with client.connect(spec):
            pass
    assert (await client.health()).boot_id


async def test_a_client_that_leaves_closes_the_connection_even_when_nothing_is_read(
    client: guests.GuestClient,
) -> None:
    """The service takes nothing, so the agent reads nothing; only the kernel says that the client left."""
    gone = asyncio.get_running_loop().create_future()
    may_read = asyncio.Event()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await may_read.wait()
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
        gone.set_result(None)

    async with service(deaf) as port:
        async with client.connect(guest.ConnectSpec(port)) as tunnel:
            flood = asyncio.create_task(tunnel.write(bytes(32 * MIB)))
            done, _ = await asyncio.wait({flood}, timeout=0.5)
            assert not done, "32 MiB fitted somewhere"
            flood.cancel()
        may_read.set()
        await asyncio.wait_for(gone, 30)


async def test_a_service_that_breaks_off_is_told(client: guests.GuestClient) -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        writer.transport.abort()

    async with service(reset) as port, client.connect(guest.ConnectSpec(port)) as tunnel:
        await tunnel.write(b"xx")
        with pytest.raises(errors.OperationFailedError, match="lost"):
            await read_all(tunnel)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        self._transport.sendto(data[::-1], addr)


async def test_a_datagram_stays_a_datagram(client: guests.GuestClient) -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(_Udp, ("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    try:
        async with client.connect(guest.ConnectSpec(port, protocol="udp")) as tunnel:
            for datagram in (b"one", b"two" * 10_000):
                await tunnel.write(datagram)
                assert await tunnel.read() == datagram[::-1]
    finally:
        transport.close()
        await protocol.closed


@pytest.mark.parametrize("sent", [guest.frame(guest.FrameType.STDIN, b"x"), guest.HEADER.pack(2**31, 4)])
async def test_nonsense_in_the_middle_ends_the_connection(agent_socket: Path, sent: bytes) -> None:
    async with service(echo) as port:
        reader, writer = await asyncio.open_unix_connection(str(agent_socket))
        payload = guest.connect_payload(guest.ConnectSpec(port))
        writer.write(guest.hello() + guest.request(guest.FrameType.CONNECT, payload) + sent)
        async with asyncio.timeout(15):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
