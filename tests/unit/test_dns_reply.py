# SPDX-License-Identifier: MIT
"""What a resolver says, read by ourselves: as dnslib reads it, and at no cost that others choose."""

from __future__ import annotations

import struct
import time

import dnslib
import pytest

from banger.net import wire

LONG = ".".join("a" * 126) + "."
NAMES = "example.org", "A.b.Example.ORG", LONG
ZONES = {
    "nothing": "",
    "an address": "{name} 300 A 192.0.2.7",
    "aliases": "{name} 60 CNAME cdn.net.\ncdn.net. 50 CNAME x.CDN.net.\nx.cdn.net. 70 A 192.0.2.8",
    "a ring": "{name} 60 CNAME b.net.\nb.net. 60 CNAME {name}",
    "both families": "{name} 9 A 192.0.2.7\n{name} 8 AAAA 2001:db8::7\nother.net. 1 A 192.0.2.9",
    "others": '{name} 9 TXT "x"\n{name} 9 MX 5 mail.net.\n{name} 9 A 192.0.2.7',
}


def _asked(name: str) -> tuple[wire.Question, bytes]:
    packet = bytes(dnslib.DNSRecord.question(name).pack())
    return wire.parse(packet), packet


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ZONES)
def test_it_is_read_as_dnslib_reads_it(name: str, what: str) -> None:
    asked, packet = _asked(name)
    made = dnslib.DNSRecord.parse(packet).reply()
    made.add_answer(*dnslib.RR.fromZone(ZONES[what].format(name=f"{name.rstrip('.')}.")))
    made.add_auth(*dnslib.RR.fromZone("org. 60 NS ns.org."))
    made.add_ar(*dnslib.RR.fromZone("ns.org. 60 A 192.0.2.1"), dnslib.EDNS0(udp_len=1232))
    found = wire.read_reply(bytes(made.pack()), asked, asked.id)
    assert found is not None
    wanted = {
        "an address": (("192.0.2.7",), 300),
        "aliases": (("192.0.2.8",), 50),
        "a ring": ((), 60),
        "both families": (("192.0.2.7", "2001:db8::7"), 8),
        "others": (("192.0.2.7",), 9),
    }
    assert (found.addresses, found.ttl_s) == wanted.get(what, ((), 0))


def _reply(packet: bytes, body: bytes, records: int) -> bytes:
    return packet[:2] + struct.pack("!5H", 0x8180, 1, records, 0, 0) + packet[12:] + body


def test_many_records_of_a_long_name_take_no_time() -> None:
    """A guest that asks for them again and again would have all that the daemon has."""
    asked, packet = _asked(LONG)
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 300, 4) + b"\xc0\0\2\7"
    many = (wire.MAX_TCP_BYTES - len(packet)) // len(record)
    reply = _reply(packet, record * many, many)
    began = time.process_time()
    assert len(dnslib.DNSRecord.parse(reply).rr) == many
    of_dnslib_s, began = time.process_time() - began, time.process_time()
    found = wire.read_reply(reply, asked, asked.id)
    assert time.process_time() - began < of_dnslib_s / 5
    assert found is not None
    assert len(found.addresses) == many
    began = time.process_time()
    cut = wire.fit(reply, asked)
    assert time.process_time() - began < of_dnslib_s / 100
    parsed = dnslib.DNSRecord.parse(cut)
    assert (parsed.header.tc, parsed.rr, parsed.q.qname.label) == (1, [], dnslib.DNSLabel(LONG).label)


_FIXED = struct.pack("!HHIH", 1, 1, 300, 4) + b"\xc0\0\2\7"
_END = 12 + len("example.org") + 2 + 4
"""Where the first record begins."""


@pytest.mark.parametrize(
    "name",
    [
        b"\xc0" + bytes([_END]),
        b"\xc0" + bytes([_END + 2]) + b"\1a\0",
        b"\xc0\x0b",
        b"\1a\xc0" + bytes([_END]),
        b"\x40a\0",
        b"\x80\x0c",
        b"\1a" * 128 + b"\0",
        b"\1a",
        b"\xff\xff",
    ],
    ids=["itself", "ahead", "header", "ring", "0x40", "0x80", "long", "cut", "beyond"],
)
def test_what_is_no_name_makes_it_no_reply(name: bytes) -> None:
    asked, packet = _asked("example.org")
    assert len(packet) == _END
    assert wire.read_reply(_reply(packet, name + _FIXED, 1), asked, asked.id) is None


@pytest.mark.parametrize("off", [-1, 1])
def test_it_holds_exactly_what_it_says(off: int) -> None:
    asked, packet = _asked("example.org")
    body = b"\xc0\x0c" + _FIXED
    assert wire.read_reply(_reply(packet, body, 1), asked, asked.id) is not None
    assert wire.read_reply(_reply(packet, (body + b"\0")[: len(body) + off], 1), asked, asked.id) is None
    assert wire.read_reply(_reply(packet, body, 1 + off), asked, asked.id) is None


def test_names_that_point_at_one_another_take_no_time() -> None:
    asked, packet = _asked("example.org")
    filler = b"\xc0\x0c" + b"".join(struct.pack("!H", 0xC000 | _END + 12 + n) for n in range(0, 14_000, 2))
    first = b"\xc0\x0c" + struct.pack("!HHIH", 16, 1, 300, len(filler)) + filler
    rest = [struct.pack("!H", 0xC000 | _END + 12 + n) + _FIXED for n in range(0, 14_000, 4)]
    for records in (rest, rest[::-1]):
        reply = _reply(packet, first + b"".join(records), 1 + len(records))
        began = time.process_time()
        wire.read_reply(reply, asked, asked.id)
        assert time.process_time() - began < 1
