# SPDX-License-Identifier: MIT
"""Our DNS server with real clients on loopback: dig, slow and many connections, floods of nonsense."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import os
import socket
import struct
from collections.abc import AsyncIterator

import dnslib
import pytest

from banger.contract import errors
from banger.net import dns, wire, zone
from tests.contract import dns_served

NETWORK = ipaddress.IPv4Network("10.213.240.0/20")
WEB = ipaddress.IPv4Address("10.213.240.2")
RESPOND = wire.responder(zone.of([("web", WEB)], NETWORK, serial=1))
QUERY = bytes(dnslib.DNSRecord.question("web.vm").pack())


@pytest.fixture
async def server() -> AsyncIterator[dns.Server]:
    """Answers for one VM, `web`."""
    async with dns_served.serving(lambda data, _peer, _tcp: RESPOND(data)) as made:
        yield made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["web.vm"], "ANSWER: 1"),
        (["+tcp", "web.vm"], "ANSWER: 1"),
        (["+noedns", "web.vm"], "ANSWER: 1"),
        (["a.b.WEB.vm"], "ANSWER: 1"),
        (["-x", str(WEB)], "web.vm."),
        (["web.vm", "AAAA"], "SOA"),
        (["nobody.vm"], "NXDOMAIN"),
        (["vm", "SOA"], "nobody.localhost"),
        (["example.org"], "REFUSED"),
        (["version.bind", "CH", "TXT"], "REFUSED"),
        (["+edns=1", "+noednsnegotiation", "web.vm"], "BADVERS"),
        (["+opcode=NOTIFY", "web.vm"], "NOTIMP"),
        (["+dnssec", "+bufsize=4096", "+cookie", "web.vm"], "udp: 1232"),
    ],
    ids=" ".join,
)  # fmt: skip
async def test_dig_is_answered(server: dns.Server, arguments: list[str], said: str) -> None:
    assert said in await asyncio.to_thread(dns_served.dig, server, *arguments)


async def test_dig_gives_the_address(server: dns.Server) -> None:
    assert await asyncio.to_thread(dns_served.dig, server, "+short", "web.vm") == f"{WEB}\n"


def _client(server: dns.Server) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.connect(("127.0.0.1", dns_served.port_of(server)))
    return made


async def test_a_flood_of_nonsense_leaves_it_answering(server: dns.Server) -> None:
    loop = asyncio.get_running_loop()
    with _client(server) as client:
        for number in range(3000):
            nonsense = os.urandom(number % 200) if number % 2 else QUERY[: number % len(QUERY)]
            client.send(nonsense)
            if number % 50 == 0:
                await asyncio.sleep(0)
        client.send(b"\xfe\xfe" + QUERY[2:])
        async with asyncio.timeout(30):
            while (await loop.sock_recv(client, 2000))[:2] != b"\xfe\xfe":
                pass


async def test_pipelined_questions_by_tcp(server: dns.Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", dns_served.port_of(server))
    message = struct.pack("!H", len(QUERY)) + QUERY
    writer.write(message * 50)
    for _ in range(50):
        size = int.from_bytes(await reader.readexactly(2), "big")
        assert (await reader.readexactly(size))[:2] == QUERY[:2]
    writer.close()


@pytest.mark.parametrize(
    "sent", [b"\0", b"\0\5abcde", b"\xff\xff" + bytes(100), b"\0\x0c\0\0\x80" + bytes(9)]
)
async def test_what_is_no_message_ends_the_connection(server: dns.Server, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", dns_served.port_of(server))
    writer.write(sent)
    writer.write_eof()
    async with asyncio.timeout(30):
        assert await _rest(reader) == b""
    writer.close()


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_slow_clients_are_ended_and_hold_up_nobody(
    server: dns.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "_IDLE_S", 0.3)
    slow = [await asyncio.open_connection("127.0.0.1", dns_served.port_of(server)) for _ in range(100)]
    for _, writer in slow:
        writer.write(b"\0")  # half of a length, and then nothing
    assert str(WEB) in await asyncio.to_thread(dns_served.dig, server, "+short", "web.vm")
    async with asyncio.timeout(30):
        assert set(await asyncio.gather(*(_rest(reader) for reader, _ in slow))) == {b""}
    for _, writer in slow:
        writer.close()
    assert str(WEB) in await asyncio.to_thread(dns_served.dig, server, "+tcp", "+short", "web.vm")


async def test_a_guest_with_many_connections_leaves_others_theirs() -> None:
    made = dns.Server(dns_served.LOOPBACK, 0, lambda data, _peer, _tcp: RESPOND(data))
    await made.start(device="lo")
    greedy = [await asyncio.open_connection("127.0.0.1", dns_served.port_of(made)) for _ in range(64)]
    for _, writer in greedy:
        writer.write(b"\0")
    try:
        async with asyncio.timeout(30):
            at, other = dns_served.port_of(made), ("127.0.0.2", 0)
            reader, writer = await asyncio.open_connection("127.0.0.1", at, local_addr=other)
            writer.write(struct.pack("!H", len(QUERY)) + QUERY)
            size = int.from_bytes(await reader.readexactly(2), "big")
            assert (await reader.readexactly(size))[:2] == QUERY[:2]
    finally:
        for _, each in [*greedy, (reader, writer)]:
            each.close()
        await made.close()


@pytest.mark.parametrize("tcp", [False, True])
async def test_many_greedy_guests_leave_others_their_share(tcp: bool) -> None:
    """Each has all that one may: connections, or questions that nobody answers."""
    never = asyncio.Event()

    async def answer(data: bytes, peer: str, _: bool) -> bytes | None:
        if peer != "127.0.0.1":
            await never.wait()
        return RESPOND(data)

    made = dns.Server(dns_served.LOOPBACK, 0, answer)
    await made.start(device="lo")
    greedy: list[socket.socket] = []
    try:
        for guest in range(2, 22):
            for _ in range(16 if tcp else 64):
                each = socket.socket(type=socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
                greedy.append(each)
                each.bind((f"127.0.0.{guest}", 0))
                each.connect(("127.0.0.1", dns_served.port_of(made)))
                each.send(struct.pack("!H", len(QUERY)) + QUERY if tcp else QUERY)
            await asyncio.sleep(0)
        arguments = ["+tcp"] if tcp else ["+timeout=5"]
        assert str(WEB) in await asyncio.to_thread(dns_served.dig, made, *arguments, "+short", "web.vm")
    finally:
        for each in greedy:
            each.close()
        await made.close()


async def test_who_is_gone_before_it_is_served_is_no_error(
    server: dns.Server, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", dns_served.port_of(server))) as gone:
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert str(WEB) in await asyncio.to_thread(dns_served.dig, server, "+tcp", "+short", "web.vm")
    await server.close()
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_a_port_in_use_is_named_and_leaves_nothing_bound(kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if kind is socket.SOCK_STREAM:
            other.listen()
        port = other.getsockname()[1]
        server = dns.Server(dns_served.LOOPBACK, port, lambda *_: None)
        with pytest.raises(errors.ConflictError, match=f"127.0.0.1:{port}") as caught:
            await server.start()
        assert "dns_listen" in caught.value.hint
        await server.close()
    again = dns.Server(dns_served.LOOPBACK, port, lambda *_: None)
    await again.start()
    await again.close()


async def test_an_address_that_comes_later_can_be_bound() -> None:
    server = dns.Server(ipaddress.IPv4Address("10.213.240.1"), 0, lambda *_: None)
    with pytest.raises(errors.ConflictError):
        await server.start()
    await server.start(not_there_yet=True)
    await server.close()
