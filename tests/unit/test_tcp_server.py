# SPDX-License-Identifier: MIT
"""When a server ends, nobody of it stays: not those it serves, not the one who just comes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import struct

import pytest

from banger.net import tcp_server

pytestmark = pytest.mark.filterwarnings("error")


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()


def _listening() -> socket.socket:
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(16)
    made.setblocking(False)
    return made


def _ended(client: socket.socket) -> bool:
    client.settimeout(30)
    try:
        return client.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("turns", range(8))
def test_one_who_comes_as_it_ends_is_hung_up_on(turns: int) -> None:
    """`turns` of the loop lie between the connection and the end: it may be waiting, known or served."""
    with socket.socket() as client:

        async def go() -> None:
            listening = _listening()
            address = listening.getsockname()
            server = tcp_server.TcpServer(_echo, most=10)
            server.start(listening)
            client.connect(address)
            for _ in range(turns):
                await asyncio.sleep(0)
            await server.close()

        asyncio.run(go())
        gc.collect()
        assert _ended(client)


def test_a_peer_that_vanished_keeps_no_place_for_ever() -> None:
    """A laptop that fell asleep says no goodbye, and would be one of the few that are served."""
    found: list[int] = []

    async def look(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        found.extend(connection.getsockopt(socket.IPPROTO_TCP, name) for name in names)

    async def go() -> None:
        listening = _listening()
        address = listening.getsockname()
        server = tcp_server.TcpServer(look, most=10)
        server.start(listening)
        reader, writer = await asyncio.open_connection(*address)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await server.close()

    asyncio.run(go())
    is_asked, idle_s, between_s, times = found
    assert is_asked
    assert idle_s + between_s * times <= 300


def test_a_peer_that_vanished_after_its_last_word_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for an answer that a guest does not give, and is gone before it."""
    monkeypatch.setattr(tcp_server, "_LOOK_S", 0.01)
    heard, gone = asyncio.Event(), asyncio.Event()

    async def wait(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"last"
        heard.set()
        try:
            await asyncio.Event().wait()
        finally:
            gone.set()

    async def go() -> None:
        listening = _listening()
        server = tcp_server.TcpServer(wait, most=1)
        server.start(listening)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.connect(listening.getsockname())
            client.sendall(b"last")
            client.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(10):
                await heard.wait()
            await asyncio.sleep(0.05)
            assert not gone.is_set()
        async with asyncio.timeout(10):
            await gone.wait()
        await server.close()

    asyncio.run(go())


def test_more_than_it_takes_are_hung_up_on_and_others_served() -> None:
    async def go() -> None:
        listening = _listening()
        address = listening.getsockname()
        server = tcp_server.TcpServer(_echo, most=1)
        server.start(listening)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"
        other, other_writer = await asyncio.open_connection(*address)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await other.readexactly(1)
        other_writer.close()
        writer.write(b"two")
        assert await reader.readexactly(3) == b"two"
        await server.close()
        assert await reader.read() == b""
        writer.close()

    asyncio.run(go())


def test_a_peer_that_takes_nothing_keeps_its_place_and_goes_with_the_server() -> None:
    """Else what is still to be sent is a connection that nobody counts and nobody ends."""
    found: list[asyncio.StreamWriter] = []
    said = asyncio.Event()

    async def say(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.append(writer)
        writer.write(bytes(64 << 20))
        said.set()

    async def go() -> None:
        listening = _listening()
        address = listening.getsockname()
        server = tcp_server.TcpServer(say, most=1)
        server.start(listening)
        with socket.socket() as deaf:
            deaf.connect(address)
            await said.wait()
            other, other_writer = await asyncio.open_connection(*address)
            with contextlib.suppress(ConnectionResetError):
                assert await other.read() == b""
            other_writer.close()
            assert len(found) == 1
            await server.close()
            await asyncio.sleep(0)
            assert found[0].get_extra_info("socket").fileno() == -1

    asyncio.run(go())


def test_without_descriptors_it_waits_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tcp_server, "_PAUSE_S", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def go() -> None:
        listening = _listening()
        server = tcp_server.TcpServer(_echo, most=10)
        server.start(listening)
        client = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            client.connect(listening.getsockname())
            await asyncio.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        reader, writer = await asyncio.open_connection(sock=client)
        writer.write(b"one")
        async with asyncio.timeout(30):
            assert await reader.readexactly(3) == b"one"
        await server.close()
        writer.close()

    asyncio.run(go())
    assert "cannot take a connection" in caplog.text
