# SPDX-License-Identifier: MIT
"""DNS for guests: what each may learn, whom it may ask, what is opened for it, and how much of it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import dnslib
import pytest

from banger.contract import destinations
from banger.net import dns, forwarder, upstream, wire
from tests.contract import dns_served

NETWORK = ipaddress.IPv4Network("10.213.240.0/20")
NEVER_OPENED = ("169.254.169.254", "168.63.129.16", "127.0.0.1", "10.213.240.1", "0.0.0.0", "224.0.0.1")  # noqa: S104
NEVER_OPENED6 = ("::1", "fe80::1", "fd62:616e:6765:7200::1", "fd00:ec2::254", "::ffff:10.0.0.1")
RECORDS = {
    "example.org.": "example.org. 300 A 192.0.2.7",
    "api.example.org.": "api.example.org. 10 CNAME cdn.net.\ncdn.net. 5 A 192.0.2.8\ncdn.net. 5 A 192.0.2.9",
    "big.example.org.": "\n".join(f"big.example.org. 60 A 192.0.2.{n}" for n in range(1, 60)),
    "six.example.org.": "six.example.org. 300 AAAA 2001:db8::7",
    "evil6.org.": "\n".join(f"evil6.org. 60 AAAA {each}" for each in NEVER_OPENED6),
    "evil.org.": "\n".join(f"evil.org. 60 A {each}" for each in NEVER_OPENED),
}


def guest(slot: int, name: str = "web", **fields: object) -> forwarder.Guest:
    address = NETWORK.network_address + 1 + slot
    return forwarder.Guest(f"{slot:012x}", name, slot, address, **fields)  # type: ignore[arg-type]


@dataclass
class Desk:
    """A forwarder, the resolver it asks, and what it had opened."""

    forwarding: forwarder.Forwarder
    opened: list[tuple[str, tuple[str, ...], int, int]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def ask(
        self, who: forwarder.Guest | str, name: str, kind: str = "A", *, tcp: bool = False
    ) -> dnslib.DNSRecord | None:
        peer = who if isinstance(who, str) else str(who.address)
        query = bytes(dnslib.DNSRecord.question(name, kind).pack())
        reply = self.forwarding.handle(query, peer, tcp)
        if reply is not None and not isinstance(reply, bytes):
            reply = await reply
        if reply is None:
            return None
        assert reply[:2] == query[:2]
        return dnslib.DNSRecord.parse(reply)

    async def rcode(self, who: forwarder.Guest | str, name: str) -> str:
        reply = await self.ask(who, name)
        return "silence" if reply is None else str(dnslib.RCODE[reply.header.rcode])


@contextlib.asynccontextmanager
async def desk_with(
    *guests: forwarder.Guest, spoil: Callable[[bytes], bytes] = bytes
) -> AsyncIterator[Desk]:
    asked: list[str] = []
    async with dns_served.serving(dns_served.upstream(RECORDS, asked, spoil)) as server:
        endpoint = ("127.0.0.1", dns_served.port_of(server))
        asking = upstream.Upstream(lambda: [endpoint])
        opened: list[tuple[str, tuple[str, ...], int, int]] = []

        async def open_addresses(
            who: forwarder.Guest, addresses: Sequence[str], ttl_s: int, port: int
        ) -> None:
            opened.append((who.name, tuple(addresses), ttl_s, port))

        made = forwarder.Forwarder(NETWORK, asking.ask, open_addresses)
        made.update(guests, serial=1)
        yield Desk(made, opened, asked)


WEB = guest(1, forward=True)


async def test_a_guest_learns_of_itself_and_of_its_network_alone() -> None:
    blue, other = guest(2, "blue", peers="lab"), guest(3, "other", peers="lab")
    async with desk_with(WEB, blue, other) as desk:
        assert await desk.rcode(WEB, "web.vm") == "NOERROR"
        assert await desk.rcode(WEB, "blue.vm") == "NXDOMAIN"
        assert await desk.rcode(blue, "other.vm") == "NOERROR"
        assert await desk.rcode(blue, "web.vm") == "NXDOMAIN"
        assert await desk.rcode(WEB, "3.240.213.10.in-addr.arpa") == "NXDOMAIN"
        assert desk.asked == []


async def test_names_beyond_are_asked_for_with_nat_only() -> None:
    alone = guest(2, "alone")
    async with desk_with(WEB, alone) as desk:
        reply = await desk.ask(WEB, "example.org")
        assert reply is not None
        assert [str(each.rdata) for each in reply.rr] == ["192.0.2.7"]
        assert await desk.rcode(WEB, "nothing.example") == "NXDOMAIN"
        assert await desk.rcode(alone, "example.org") == "REFUSED"
        assert desk.opened == []


@pytest.mark.parametrize("peer", ["192.0.2.1", "10.213.240.1", "10.213.240.9", "127.0.0.1"])
async def test_who_is_no_running_guest_hears_nothing(peer: str) -> None:
    async with desk_with(WEB) as desk:
        assert await desk.rcode(peer, "example.org") == "silence"
        assert await desk.rcode(peer, "web.vm") == "silence"
        desk.forwarding.update([], serial=2)
        assert await desk.rcode(WEB, "web.vm") == "silence"


async def test_allowed_names_are_opened_before_the_guest_learns_them() -> None:
    names = (
        destinations.NamedDestination("*.example.org", 443),
        destinations.NamedDestination("example.org"),
    )
    shut = guest(2, "shut", forward=True, everything=False, allowed=names)
    async with desk_with(shut) as desk:
        assert await desk.rcode(shut, "api.EXAMPLE.org") == "NOERROR"
        assert desk.opened == [("shut", ("192.0.2.8", "192.0.2.9"), 60, 443)]
        assert await desk.rcode(shut, "example.org") == "NOERROR"
        assert desk.opened[1:] == [("shut", ("192.0.2.7",), 300, 0), ("shut", ("192.0.2.7",), 300, 443)]
        assert await desk.rcode(shut, "example.org") == "NOERROR"
        assert len(desk.opened) == 3, "what was opened just now was opened again"
        assert await desk.rcode(shut, "xexample.org") == "REFUSED"
        assert await desk.rcode(shut, "evil.org") == "REFUSED"


async def test_ipv6_addresses_are_opened_for_a_guest_that_has_one() -> None:
    allowed = (destinations.NamedDestination("six.example.org"), destinations.NamedDestination("evil6.org"))
    address6 = ipaddress.IPv6Address("fd62:616e:6765:7200::3")
    both = guest(2, "both", forward=True, everything=False, allowed=allowed, address6=address6)
    four = guest(3, "four", forward=True, everything=False, allowed=allowed)
    async with desk_with(both, four) as desk:
        for who in (both, four):
            reply = await desk.ask(who, "six.example.org", "AAAA")
            assert reply is not None
            assert [str(each.rdata) for each in reply.rr] == ["2001:db8::7"]
            await desk.ask(who, "evil6.org", "AAAA")
        assert desk.opened == [("both", ("2001:db8::7",), 300, 0)]
        named = await desk.ask(both, "both.vm", "AAAA")
        assert named is not None
        assert [str(each.rdata) for each in named.rr] == ["fd62:616e:6765:7200::3"]


async def test_an_allowed_name_opens_no_way_to_host_guests_or_metadata() -> None:
    shut = guest(
        2, "shut", forward=True, everything=False, allowed=(destinations.NamedDestination("evil.org"),)
    )
    async with desk_with(shut) as desk:
        assert await desk.rcode(shut, "evil.org") == "NOERROR"
        assert desk.opened == []


async def test_when_opening_fails_the_guest_learns_nothing() -> None:
    from banger.contract import errors

    shut = guest(
        2, "shut", forward=True, everything=False, allowed=(destinations.NamedDestination("example.org"),)
    )
    async with desk_with(shut) as desk:

        async def refuse(*_: object) -> None:
            raise errors.ConflictError("no")

        desk.forwarding._open = refuse
        assert await desk.rcode(shut, "example.org") == "SERVFAIL"


class Slow:
    """A forwarder whose resolver and whose root answer when they are told to."""

    def __init__(self, *guests: forwarder.Guest) -> None:
        self.answers, self.opens = asyncio.Event(), asyncio.Event()
        self.opened: list[tuple[str, int]] = []
        self.at_once = self.most = 0
        self.forwarding = forwarder.Forwarder(NETWORK, self._ask, self._open)
        self.forwarding.update(guests, serial=1)
        self.desk = Desk(self.forwarding)

    async def _ask(self, data: bytes, question: wire.Question, *, tcp: bool) -> tuple[bytes, wire.Reply]:
        await self.answers.wait()
        reply = dnslib.DNSRecord.parse(data).reply()
        reply.add_answer(*dnslib.RR.fromZone(RECORDS["example.org."]))
        data = bytes(reply.pack())
        found = wire.read_reply(data, question, question.id)
        assert found is not None
        return data, found

    async def _open(self, who: forwarder.Guest, addresses: Sequence[str], ttl_s: int, port: int) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await self.opens.wait()
        self.at_once -= 1
        self.opened.append((who.id, port))


def shut(*ports: int, **fields: object) -> forwarder.Guest:
    allowed = tuple(destinations.NamedDestination("example.org", port) for port in ports)
    return guest(2, "shut", forward=True, everything=False, allowed=allowed, **fields)


async def test_what_was_asked_before_a_change_opens_nothing_after_it() -> None:
    """Whoever answers could hold an answer back until then, and name a day."""
    before, after = shut(443), shut()
    slow = Slow(before)
    slow.opens.set()
    asking = asyncio.create_task(slow.desk.rcode(before, "example.org"))
    await asyncio.sleep(0)
    slow.forwarding.update([after], serial=2)
    slow.answers.set()
    assert await asking == "SERVFAIL"
    assert slow.opened == []


async def test_nothing_is_opened_while_what_a_guest_may_reach_changes() -> None:
    before = shut(443)
    slow = Slow(before, WEB)
    slow.answers.set()
    slow.opens.set()
    async with slow.forwarding.changing(before.id):
        asking = asyncio.create_task(slow.desk.rcode(before, "example.org"))
        assert await slow.desk.rcode(WEB, "example.org") == "NOERROR"
        for _ in range(20):
            await asyncio.sleep(0)
        assert slow.opened == []
        slow.forwarding.update([shut(80), WEB], serial=2)
    assert await asking == "SERVFAIL"
    assert slow.opened == []
    assert await slow.desk.rcode(before, "example.org") == "NOERROR"
    assert slow.opened == [(before.id, 80)]
    async with slow.forwarding.changing("nobody"):
        pass


async def test_root_is_asked_for_one_thing_of_a_guest_s_at_a_time() -> None:
    """It hears 64 at once: one guest that has many names opened would keep all others waiting."""
    one = shut(*range(1, 9))
    slow = Slow(one)
    slow.answers.set()
    asking = [asyncio.create_task(slow.desk.rcode(one, "example.org")) for _ in range(8)]
    for _ in range(50):
        await asyncio.sleep(0)
    assert slow.most == 1
    slow.opens.set()
    assert set(await asyncio.gather(*asking)) == {"NOERROR"}
    assert (slow.most, len(slow.opened)) == (1, 8)


async def test_a_record_that_lives_longer_than_what_is_open_is_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = guest(2, "shut", forward=True, everything=False, allowed=(destinations.NamedDestination("a.org"),))
    async with desk_with(one) as desk:
        for life in (5, 50, 3600, 3600, 300):
            monkeypatch.setitem(RECORDS, "a.org.", f"a.org. {life} A 192.0.2.7")
            assert await desk.rcode(one, "a.org") == "NOERROR"
        assert [ttl_s for *_, ttl_s, _ in desk.opened] == [60, 3600]


async def test_a_long_answer_counts_as_many_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarder, "_RATE", 50.0)

    async def ask(data: bytes, question: wire.Question, *, tcp: bool) -> tuple[bytes, wire.Reply]:
        return data[:2] + bytes(60_000), wire.Reply(False, (), 0)

    made = forwarder.Forwarder(NETWORK, ask, _nothing)
    made.update([WEB], serial=1)
    query = bytes(dnslib.DNSRecord.question("example.org").pack())
    answered = 0
    while (asking := made.handle(query, str(WEB.address), True)) is not None:
        assert not isinstance(asking, bytes)
        assert await asking is not None
        answered += 1
    assert 2 <= answered <= 4


async def test_a_long_answer_comes_by_tcp() -> None:
    async with desk_with(WEB) as desk:
        by_udp = await desk.ask(WEB, "big.example.org")
        by_tcp = await desk.ask(WEB, "big.example.org", tcp=True)
        assert by_udp is not None
        assert by_tcp is not None
        assert (by_udp.header.tc, by_udp.rr, len(by_tcp.rr)) == (1, [], 59)
        assert desk.asked == ["big.example.org. udp", "big.example.org. tcp", "big.example.org. tcp"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data.replace(b"\7example", b"\7exbmple"),
        lambda data: data[:2] + bytes([data[2] & 0x7F]) + data[3:],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
    ],
    ids=["other id", "other question", "no reply", "cut", "empty"],
)
async def test_what_is_not_the_answer_is_not_believed(
    spoil: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_TRY_S", 0.3)
    async with desk_with(WEB, spoil=spoil) as desk:
        assert await desk.rcode(WEB, "example.org") == "SERVFAIL"


async def test_each_guest_has_its_rate_and_its_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    other = guest(2, "other", forward=True)
    async with desk_with(WEB, other) as desk:
        said = [await desk.rcode(WEB, "web.vm") for _ in range(2000)]
        assert said.count("silence") > 1000
        assert await desk.rcode(other, "other.vm") == "NOERROR"
    monkeypatch.setattr(upstream, "_TRY_S", 0.5)
    async with desk_with(WEB, spoil=lambda _: b"") as desk:
        said = await asyncio.gather(*(desk.rcode(WEB, "example.org") for _ in range(100)))
        assert (said.count("REFUSED"), said.count("SERVFAIL")) == (36, 64)


async def test_a_resolver_that_is_not_there_is_passed_over() -> None:
    asked: list[str] = []
    async with dns_served.serving(dns_served.upstream(RECORDS, asked)) as server:
        working = ("127.0.0.1", dns_served.port_of(server))
        nobody = dns.Server(dns_served.LOOPBACK, 0, lambda *_: None)
        await nobody.start()
        dead = ("127.0.0.1", dns_served.port_of(nobody))
        await nobody.close()
        made = forwarder.Forwarder(NETWORK, upstream.Upstream(lambda: [dead, working]).ask, _nothing)
        made.update([WEB], serial=1)
        assert await Desk(made).rcode(WEB, "example.org") == "NOERROR"


def _says(rcode: int) -> Callable[[bytes], bytes]:
    """Spoils a reply: its header says that, and that there is no record."""
    return lambda data: (
        data[:3] + bytes([data[3] & 0xF0 | rcode]) + data[4:6] + bytes(6) + data[12 : _end(data)]
    )


def _end(data: bytes) -> int:
    """Where the question ends."""
    return data.index(b"\0", 12) + 5


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED", "NOTIMP"])
async def test_a_resolver_that_cannot_answer_is_passed_over(rcode: str) -> None:
    bad = dns_served.upstream(RECORDS, [], _says(dnslib.RCODE.reverse[rcode]))
    async with (
        dns_served.serving(bad) as broken,
        dns_served.serving(dns_served.upstream(RECORDS, [])) as fine,
    ):
        endpoints = [("127.0.0.1", dns_served.port_of(server)) for server in (broken, fine)]
        made = forwarder.Forwarder(NETWORK, upstream.Upstream(lambda: endpoints).ask, _nothing)
        made.update([WEB], serial=1)
        assert await Desk(made).rcode(WEB, "example.org") == "NOERROR"
        del endpoints[1]
        assert await Desk(made).rcode(WEB, "example.org") == rcode


async def test_a_long_answer_that_was_cut_anywhere_comes_by_tcp() -> None:
    """As some routers cut it: at 512 bytes, in the middle of a record."""

    def cut(data: bytes) -> bytes:
        return data[:6] + b"\0\5" + data[8:] + b"\xc0\x0c\0\1" if data[2] & 2 else data

    async with desk_with(WEB, spoil=cut) as desk:
        by_tcp = await desk.ask(WEB, "big.example.org", tcp=True)
        by_udp = await desk.ask(WEB, "big.example.org")
        assert by_udp is not None
        assert by_tcp is not None
        assert (by_udp.header.tc, by_udp.rr, len(by_tcp.rr)) == (1, [], 59)


async def _nothing(*_: object) -> None:
    return None


def test_the_hosts_resolvers_are_its_resolv_conf_without_ourselves(tmp_path: Path) -> None:
    conf = tmp_path / "resolv.conf"
    servers = ("10.213.240.1", "192.0.2.1", "fe80::1%lo", "", "x", "192.0.2.2 ", "192.0.2.3")
    assert upstream.of_host(conf) == ()
    conf.write_text("# x\nsearch lan\n" + "".join(f"nameserver {each}\n" for each in servers))
    assert upstream.of_host(conf, never=["10.213.240.1"]) == (
        ("192.0.2.1", 53),
        ("fe80::1%lo", 53),
        ("192.0.2.2", 53),
    )
    assert [upstream.text_of(each) for each in upstream.of_host(conf)[1:]] == [
        "192.0.2.1:53",
        "[fe80::1%lo]:53",
    ]


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_resolver_with_ipv6_alone_is_asked(tcp: bool) -> None:
    answered = dns_served.upstream(RECORDS, [])

    class ByUdp(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            self.transport.sendto(answered(data, addr[0], False), addr)  # type: ignore[attr-defined] # it is one

    async def by_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        reply = answered(asked, "", True)
        assert isinstance(reply, bytes)
        writer.write(len(reply).to_bytes(2, "big") + reply)
        writer.close()

    async with await asyncio.start_server(by_tcp, "::1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(ByUdp, local_addr=("::1", port))
        made = forwarder.Forwarder(NETWORK, upstream.Upstream(lambda: [("::1", port)]).ask, _nothing)
        made.update([WEB], serial=1)
        reply = await Desk(made).ask(WEB, "example.org", tcp=tcp)
        transport.close()
    assert reply is not None
    assert str(reply.rr[0].rdata) == "192.0.2.7"


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("1.1.1.1", ("1.1.1.1", 53)),
        ("1.1.1.1:5353", ("1.1.1.1", 5353)),
        ("2001:db8::1", ("2001:db8::1", 53)),
        ("[2001:DB8::1]:5353", ("2001:db8::1", 5353)),
        ("fe80::1%eth0", ("fe80::1%eth0", 53)),
    ],
)
def test_an_endpoint(text: str, server: upstream.Endpoint) -> None:
    assert upstream.parse_endpoint(text) == server
    assert upstream.parse_endpoint(upstream.text_of(server)) == server


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1:0", "1.1.1.1:", "1.1.1.1:x", "1.1.1.1:\u0665", "x", "", "[::1]", "[1.1.1.1]:53", "::1]:53"],
)
def test_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        upstream.parse_endpoint(text)
