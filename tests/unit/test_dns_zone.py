# SPDX-License-Identifier: MIT
"""What the DNS says, packet by packet: answers, proper denials, and what nonsense comes to."""

from __future__ import annotations

import ipaddress
import struct

import dnslib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.contract import names
from banger.net import wire, zone

NETWORK = ipaddress.IPv4Network("10.213.240.0/20")
WEB = ipaddress.IPv4Address("10.213.240.2")
SIX = ipaddress.IPv6Network("fd12:3456:789a::/64")
WEB6 = SIX.network_address + 2
ZONE = zone.of(
    [("web", WEB), ("db", ipaddress.IPv4Address("10.213.241.7"))],
    NETWORK,
    serial=7,
    sixes=[("web", WEB6)],
    network6=SIX,
)
RESPOND = wire.responder(ZONE)
WEB_A = b"\3web\2vm\0\0\1\0\1"
COUNTS = st.tuples(*[st.integers(0, 3)] * 4)
OK, NXDOMAIN, REFUSED, FORMERR, NOTIMP = 0, 3, 5, 1, 4


def ask(name: str, kind: str = "A", *, edns: int = 0, number: int = 0x1234) -> dnslib.DNSRecord:
    question = dnslib.DNSRecord(
        dnslib.DNSHeader(id=number, rd=1), q=dnslib.DNSQuestion(name, getattr(dnslib.QTYPE, kind))
    )
    if edns:
        question.add_ar(dnslib.EDNS0(udp_len=edns))
    reply = RESPOND(bytes(question.pack()))
    assert reply is not None
    parsed = dnslib.DNSRecord.parse(reply)
    assert (parsed.header.id, parsed.header.qr, parsed.header.ra) == (number, 1, 0)
    return parsed


def data(record: dnslib.DNSRecord) -> list[str]:
    return [str(each.rdata) for each in record.rr]


@pytest.mark.parametrize("name", ["web.vm", "WEB.vm", "a.web.vm", "*.web.vm", "very.deep.below.web.VM."])
def test_a_name_and_everything_below_it_is_the_guests_address(name: str) -> None:
    reply = ask(name)
    assert (reply.header.rcode, reply.header.aa, data(reply)) == (OK, 1, [str(WEB)])
    assert reply.rr[0].ttl == zone.TTL_S


def test_the_spelling_of_a_question_comes_back() -> None:
    """Resolvers that mix the case of letters take it for a proof that the answer is theirs."""
    reply = ask("wEb.Vm")
    assert str(reply.q.qname) == "wEb.Vm."
    assert str(reply.rr[0].rname) == "wEb.Vm."


def test_a_guest_with_ipv6_has_that_address_too_there_and_back() -> None:
    for name in ("web.vm", "a.web.vm"):
        assert data(ask(name, "AAAA")) == [str(WEB6)]
    assert data(ask("db.vm", "AAAA")) == []
    assert ask("db.vm", "AAAA").header.rcode == OK
    assert ask("nobody.vm", "AAAA").header.rcode == NXDOMAIN
    assert data(ask(WEB6.reverse_pointer, "PTR")) == ["web.vm."]


@pytest.mark.parametrize(
    ("name", "rcode"),
    [
        ((WEB6 + 1).reverse_pointer, NXDOMAIN),
        ("8.b.d.0.1.0.0.2.ip6.arpa", REFUSED),
        ("ip6.arpa", REFUSED),
        (names.reverse_zone6(SIX), OK),
        (f"0.0.{names.reverse_zone6(SIX)}", OK),
        (f"xx.{names.reverse_zone6(SIX)}", NXDOMAIN),
        (f"{'z.' * 16}{names.reverse_zone6(SIX)}", NXDOMAIN),
        (f"1.{WEB6.reverse_pointer}", NXDOMAIN),
    ],
)
def test_what_is_no_guests_ipv6_address(name: str, rcode: int) -> None:
    reply = ask(name, "PTR")
    assert (reply.header.rcode, data(reply)) == (rcode, [])


@pytest.mark.parametrize("kind", ["TXT", "MX", "HTTPS", "NS"])
def test_a_type_that_is_not_there_is_denied_with_the_soa(kind: str) -> None:
    reply = ask("web.vm", kind)
    assert (reply.header.rcode, reply.rr) == (OK, [])
    [soa] = reply.auth
    assert (str(soa.rname), soa.rtype, soa.ttl) == ("vm.", dnslib.QTYPE.SOA, zone.NEGATIVE_TTL_S)
    assert soa.rdata.times[0] == 7


@pytest.mark.parametrize("name", ["nobody.vm", "a.nobody.vm", "vm.vm", "9.240.213.10.in-addr.arpa"])
def test_a_name_that_is_not_there_is_denied_with_the_soa(name: str) -> None:
    reply = ask(name, "PTR" if name.endswith("arpa") else "A")
    assert (reply.header.rcode, reply.header.aa, reply.rr) == (NXDOMAIN, 1, [])
    assert reply.auth[0].rtype == dnslib.QTYPE.SOA
    assert str(reply.auth[0].rname) in {"vm.", "240.213.10.in-addr.arpa."}


def test_the_way_back() -> None:
    assert data(ask("2.240.213.10.in-addr.arpa", "PTR")) == ["web.vm."]
    assert data(ask("7.241.213.10.in-addr.arpa", "PTR")) == ["db.vm."]
    assert ask("2.240.213.10.in-addr.arpa", "A").header.rcode == OK


@pytest.mark.parametrize("apex", ["vm", "240.213.10.in-addr.arpa"])
def test_the_zones_own_name(apex: str) -> None:
    assert data(ask(apex, "NS")) == ["localhost."]
    [soa] = ask(apex, "SOA").rr
    assert soa.rdata.times[4] == zone.NEGATIVE_TTL_S
    assert (ask(apex, "A").header.rcode, ask(apex, "A").rr) == (OK, [])


@pytest.mark.parametrize(
    "name",
    [".", "example.org", "web.vmx", "xvm", "1.0.0.127.in-addr.arpa", "1.1.214.10.in-addr.arpa", "arpa"],
)
def test_other_zones_are_refused(name: str) -> None:
    reply = ask(name)
    assert (reply.header.rcode, reply.rr, reply.auth) == (REFUSED, [], [])


@pytest.mark.parametrize("network", ["10.0.0.0/28", "10.0.0.0/24", "10.0.0.0/16"])
def test_networks_of_any_size_have_their_reverse(network: str) -> None:
    parsed = ipaddress.IPv4Network(network)
    made = zone.of([("web", parsed.network_address + 2)], parsed, serial=1)
    name = tuple(label.encode() for label in ["2", "0", "0", "10", "in-addr", "arpa"])
    assert made.lookup(name, zone.Type.PTR).target == (b"web", b"vm")
    outside = (b"200", *name[1:])
    expected = zone.Kind.OUTSIDE if parsed.prefixlen > 24 else zone.Kind.NO_NAME
    assert made.lookup(outside, zone.Type.PTR).kind is expected
    assert names.dns_domains(parsed, SIX)[:2] == ("vm", "0.0.10.in-addr.arpa")


def test_edns_is_answered_with_edns_and_only_then() -> None:
    assert [each.rtype for each in ask("web.vm", edns=4096).ar] == [dnslib.QTYPE.OPT]
    assert ask("web.vm").ar == []
    question = dnslib.DNSRecord.question("web.vm")
    question.add_ar(dnslib.EDNS0(version=1, udp_len=1232))
    reply = RESPOND(bytes(question.pack()))
    assert reply is not None
    [option] = dnslib.DNSRecord.parse(reply).ar
    assert (option.ttl >> 24, dnslib.DNSRecord.parse(reply).rr) == (1, [])


def _packet(flags: int = 0x0100, counts: tuple[int, ...] = (1, 0, 0, 0), body: bytes = WEB_A) -> bytes:
    return struct.pack("!6H", 0xABCD, flags, *counts) + body


@pytest.mark.parametrize(
    ("packet", "rcode"),
    [
        (_packet(0x2900), NOTIMP),
        (_packet(0x1100), NOTIMP),
        (_packet(counts=(0, 0, 0, 0), body=b""), FORMERR),
        (_packet(counts=(2, 0, 0, 0), body=b"\3web\2vm\0\0\1\0\1" * 2), FORMERR),
        (_packet(counts=(65535, 65535, 65535, 65535)), FORMERR),
        (_packet(counts=(1, 1, 0, 0)), FORMERR),
        (_packet(0x0300), FORMERR),
        (_packet(body=b""), FORMERR),
        (_packet(body=b"\3web\2vm\0\0\1"), FORMERR),
        (_packet(body=b"\x3fweb"), FORMERR),
        (_packet(body=b"\xc0\x0c\0\1\0\1"), FORMERR),
        (_packet(body=b"\xc0\xff\0\1\0\1"), FORMERR),
        (_packet(body=b"\xc0\x04\0\1\0\1"), FORMERR),
        (_packet(body=b"\x80web\0\0\1\0\1"), FORMERR),
        (_packet(body=b"\3web\2vm\0\0\1\0\1trailing"), FORMERR),
        (_packet(body=(b"\x3f" + b"a" * 63) * 5 + b"\0\0\1\0\1"), FORMERR),
        (_packet(counts=(1, 0, 0, 1)), FORMERR),
        (_packet(counts=(1, 0, 0, 2), body=WEB_A + b"\0\0\x29\4\xd0\0\0\0\0\0\0" * 2), FORMERR),
        (_packet(body=b"\3web\2vm\0\0\1\0\3"), REFUSED),
        (_packet(body=b"\3web\2vm\0\0\xfc\0\1"), REFUSED),
    ],
)  # fmt: skip
def test_what_is_no_question_is_told_so_in_a_header_alone(packet: bytes, rcode: int) -> None:
    reply = RESPOND(packet)
    assert reply is not None
    number, flags, *counts = struct.unpack("!6H", reply)
    assert (number, flags >> 15, flags & 15, counts) == (0xABCD, 1, rcode, [0, 0, 0, 0])


@pytest.mark.parametrize("packet", [b"", b"\0" * 11, _packet(0x8100), _packet() + bytes(2000)])
def test_replies_and_what_is_too_short_or_too_long_get_no_answer(packet: bytes) -> None:
    """A server that answers answers can be made to talk to another one for ever."""
    assert RESPOND(packet) is None


@settings(max_examples=400)
@given(
    st.one_of(
        st.binary(max_size=600),
        st.binary(max_size=200).map(lambda body: _packet(body=body)),
        st.builds(_packet, st.integers(0, 32767), COUNTS, st.binary(max_size=99)),
    )
)  # fmt: skip
def test_no_packet_is_an_exception_or_worth_sending_for_its_answer(packet: bytes) -> None:
    reply = RESPOND(packet)
    assert reply is None or (reply[:2] == packet[:2] and len(reply) <= len(packet) + 100)


@given(st.binary(max_size=300))
def test_no_reply_of_an_upstream_server_is_an_exception(packet: bytes) -> None:
    asked = wire.Question(1, (b"a",), 1, has_edns=False, limit=512, end=19)
    assert wire.read_reply(packet, asked, 1) is None
    assert isinstance(wire.fit(packet + bytes(600), asked), bytes)


def _upstream(*records: str, name: str = "a.example") -> wire.Reply | None:
    reply = dnslib.DNSRecord(dnslib.DNSHeader(id=9, qr=1, rd=1, ra=1), q=dnslib.DNSQuestion(name))
    reply.add_answer(*dnslib.RR.fromZone("\n".join(records)))
    asked = wire.Question(1, (b"a", b"example"), 1, has_edns=False, limit=512, end=19)
    return wire.read_reply(bytes(reply.pack()), asked, 9)


def test_addresses_are_those_at_the_end_of_the_aliases() -> None:
    found = _upstream(
        "a.example 60 CNAME b.cdn.",
        "b.cdn. 30 CNAME c.cdn.",
        "c.cdn. 90 A 192.0.2.1",
        "x.evil. 9 A 10.0.0.1",
    )
    assert found == wire.Reply(truncated=False, addresses=("192.0.2.1",), ttl_s=30)


def test_aliases_in_a_circle_end() -> None:
    found = _upstream("a.example 60 CNAME b.cdn.", "b.cdn. 30 CNAME a.example.")
    assert found is not None
    assert found.addresses == ()


def test_a_reply_to_another_question_is_none() -> None:
    assert _upstream("b.example 60 A 192.0.2.1", name="b.example") is None


def test_a_long_reply_by_udp_says_to_ask_by_tcp() -> None:
    question = wire.Question(1, (b"a",), 1, has_edns=False, limit=512, end=19)
    long = dnslib.DNSRecord(dnslib.DNSHeader(id=1, qr=1), q=dnslib.DNSQuestion("a"))
    long.add_answer(*[dnslib.RR("a", rdata=dnslib.A(f"192.0.2.{n}")) for n in range(100)])
    cut = dnslib.DNSRecord.parse(wire.fit(bytes(long.pack()), question))
    assert (cut.header.tc, cut.rr, str(cut.q.qname)) == (1, [], "a.")
