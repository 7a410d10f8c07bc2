# SPDX-License-Identifier: MIT
"""DNS messages: questions parsed with dnslib, replies without, and no packet gets through as an exception.

An answer is never much longer than its question plus one record, so nobody is amplified. Pure.
"""

from __future__ import annotations

import functools
import ipaddress
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import dnslib

from banger.net import zone as zones

HEADER_BYTES: Final = 12
MAX_QUERY_BYTES: Final = 1232
"""A question with its options; a longer one is not answered."""
PLAIN_BYTES: Final = 512
PAYLOAD_BYTES: Final = 1232
"""What we take and send by UDP: no fragments on any usual path."""
MAX_TCP_BYTES: Final = 65535
_MAX_NAME_BYTES: Final = 255
_TRUNCATED: Final = 0x02
_MAX_ADDITIONAL: Final = 2
"""Options and a signature."""
_CACHED: Final = 2048
_RCODE_BADVERS: Final = 16
_REFUSALS: Final = (dnslib.RCODE.SERVFAIL, dnslib.RCODE.NOTIMP, dnslib.RCODE.REFUSED)
_RESPONSE: Final = 0x8000
_REPLY_BITS: Final = 0xF800
"""That it is a reply, and to what kind of question: 0, a query."""
_AUTHORITATIVE: Final = 0x0400
_ASKED: Final = b"\xc0\x0c"
"""The name of the question, wherever it is needed again."""
_NO_LABEL: Final = 0x40
_POINTER: Final = 0xC0
_POINTED_AT: Final = 0x3FFF
_HEADER: Final = struct.Struct("!6H")
_QUESTION: Final = struct.Struct("!HH")
_RECORD: Final = struct.Struct("!HHIH")
_ADDRESS_BYTES: Final = {dnslib.QTYPE.A: 4, dnslib.QTYPE.AAAA: 16}


@dataclass(frozen=True, slots=True)
class Question:
    """One whole, well-formed question."""

    id: int
    name: zones.Labels
    """In lower case."""
    type: int
    has_edns: bool
    limit: int
    """Bytes that the asker takes by UDP."""
    end: int
    """Where the question ends in its packet."""


class RefusedError(Exception):
    """Not a question to be answered. `reply` is what to say instead; None: nothing at all."""

    def __init__(self, reply: bytes | None) -> None:
        super().__init__()
        self.reply = reply


def parse(data: bytes) -> Question:
    """Raises RefusedError."""
    question, end, others = _parsed(data)
    options = [each for each in others if each.rtype == dnslib.QTYPE.OPT]
    size = len(_name(question.qname.label))
    # The first name in a packet has nothing before it to point at.
    if len(options) > 1 or size > _MAX_NAME_BYTES or size != end - HEADER_BYTES - 4:
        raise RefusedError(_bare(data, dnslib.RCODE.FORMERR))
    if options and options[0].edns_ver > 0:
        raise RefusedError(_bad_version(data, end))
    if question.qclass != dnslib.CLASS.IN or question.qtype in (dnslib.QTYPE.AXFR, dnslib.QTYPE.IXFR):
        raise RefusedError(_bare(data, dnslib.RCODE.REFUSED))
    limit = max(PLAIN_BYTES, min(options[0].edns_len, PAYLOAD_BYTES)) if options else PLAIN_BYTES
    number = int.from_bytes(data[:2], "big")
    return Question(number, lower(question.qname), question.qtype, bool(options), limit, end)


def lower(name: dnslib.DNSLabel) -> zones.Labels:
    return tuple(label.lower() for label in name.label)


def responder(zone: zones.Zone) -> Callable[[bytes], bytes | None]:
    """Answers whole packets from this zone. Packets that differ in nothing but the id are answered once."""

    @functools.lru_cache(maxsize=_CACHED)
    def answered(after_id: bytes) -> bytes | None:
        reply = _answer(zone, b"\0\0" + after_id)
        return None if reply is None else reply[2:]

    def respond(data: bytes) -> bytes | None:
        if not HEADER_BYTES <= len(data) <= MAX_QUERY_BYTES:
            return None
        reply = answered(data[2:])
        return None if reply is None else data[:2] + reply

    return respond


def refuse(data: bytes) -> bytes:
    return _bare(data, dnslib.RCODE.REFUSED)


def fail(data: bytes) -> bytes:
    return _bare(data, dnslib.RCODE.SERVFAIL)


def fit(reply: bytes, question: Question) -> bytes:
    """For UDP: what is too long becomes an empty answer that says to ask again by TCP. `reply` was read."""
    if len(reply) <= question.limit:
        return reply
    head = (
        reply[:2] + bytes((reply[2] | _TRUNCATED, reply[3])) + struct.pack("!4H", 1, 0, 0, question.has_edns)
    )
    return head + reply[HEADER_BYTES : question.end] + (_option() if question.has_edns else b"")


def with_id(data: bytes, number: int) -> bytes:
    return number.to_bytes(2, "big") + data[2:]


@dataclass(frozen=True, slots=True)
class Reply:
    """Of an upstream server, as far as it is believed: it has answered this very question."""

    truncated: bool
    addresses: tuple[str, ...]
    """What the name stands for in the end, its aliases followed."""
    ttl_s: int
    is_refusal: bool = False
    """It says nothing of the name: another server may know."""


def read_reply(data: bytes, asked: Question, number: int) -> Reply | None:
    """None unless it is a reply to this question with this id, and whole or said to be cut.

    Without dnslib, which takes a second of all that the daemon does for one that is long on purpose.
    """
    try:
        found, flags, questions, *counts = _HEADER.unpack_from(data)
        names = _Names(data)
        name, at = names.at(HEADER_BYTES)
        matches = (
            (found, flags & _REPLY_BITS, questions) == (number, _RESPONSE, 1)
            and name == asked.name
            and _QUESTION.unpack_from(data, at) == (asked.type, dnslib.CLASS.IN)
        )
        if not matches:
            return None
        if flags & _TRUNCATED << 8:  # where it was cut may be anywhere
            return Reply(truncated=True, addresses=(), ttl_s=0)
        addresses, ttl_s = _addresses(data, names, at + _QUESTION.size, counts, name)
        return Reply(False, addresses, ttl_s, is_refusal=flags & 0x0F in _REFUSALS)
    except (ValueError, IndexError, struct.error):
        return None


class _Names:
    """The names in one packet. No place is read twice, however many names point there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._known: dict[int, tuple[zones.Labels, int]] = {}

    def at(self, place: int) -> tuple[zones.Labels, int]:
        """In lower case, and where it ends. Raises ValueError or IndexError where none is."""
        passed: list[tuple[int, zones.Labels]] = []
        while (found := self._known.get(place)) is None:
            size = self._data[place]
            if not size:
                found = (), place + 1
                break
            if size >= _POINTER:
                passed.append((place, ()))
                target = (size << 8 | self._data[place + 1]) & _POINTED_AT
                if not HEADER_BYTES <= target < place:
                    raise ValueError("a name points ahead")
                place = target
            elif size < _NO_LABEL:
                passed.append((place, (self._data[place + 1 : place + 1 + size].lower(),)))
                place += 1 + size
            else:
                raise ValueError("a name has no such part")
            if len(passed) > _MAX_NAME_BYTES:
                raise ValueError("a name does not end")
        labels, end = found
        for place, label in reversed(passed):
            labels, end = label + labels, end if label else place + 2
            if place <= _POINTED_AT:
                self._known[place] = labels, end
        if len(labels) > _MAX_NAME_BYTES // 2:
            raise ValueError("a name is too long")
        return labels, end


def _addresses(
    data: bytes, names: _Names, at: int, counts: Sequence[int], name: zones.Labels
) -> tuple[tuple[str, ...], int]:
    """Of the answer's records, from `at`; all of the packet is what it says to hold."""
    aliases: dict[zones.Labels, tuple[zones.Labels, int]] = {}
    found: dict[zones.Labels, list[tuple[bytes, int]]] = {}
    for number in range(sum(counts)):
        owner, at = names.at(at)
        kind, _, ttl, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if number >= counts[0]:
            pass
        elif kind == dnslib.QTYPE.CNAME:
            aliases[owner] = names.at(at)[0], ttl
        elif size == _ADDRESS_BYTES.get(kind):
            found.setdefault(owner, []).append((data[at : at + size], ttl))
        at += size
    if at != len(data):
        raise ValueError("it is cut, or something stands behind it")
    lives: list[int] = []
    for _ in range(len(aliases)):
        if name not in aliases:
            break
        name, life = aliases[name]
        lives.append(life)
    pairs = found.get(name, [])
    addresses = tuple(str(ipaddress.ip_address(packed)) for packed, _ in pairs)
    return addresses, min([*lives, *(life for _, life in pairs)], default=0)


def _parsed(data: bytes) -> tuple[dnslib.DNSQuestion, int, list[dnslib.RR]]:
    """The one question, where it ends, and what stands behind it."""
    if not HEADER_BYTES <= len(data) <= MAX_QUERY_BYTES or data[2] & 0x80:
        raise RefusedError(None)  # a reply is never answered, or two servers could talk for ever
    if data[2] >> 3 & 0x0F != dnslib.OPCODE.QUERY:
        raise RefusedError(_bare(data, dnslib.RCODE.NOTIMP))
    # Before the parser runs: many names that point at each other would keep it busy.
    *counts, others = struct.unpack_from("!4H", data, 4)
    if counts != [1, 0, 0] or others > _MAX_ADDITIONAL or data[2] & _TRUNCATED:
        raise RefusedError(_bare(data, dnslib.RCODE.FORMERR))
    buffer = dnslib.DNSBuffer(data)
    buffer.offset = HEADER_BYTES
    try:
        question = dnslib.DNSQuestion.parse(buffer)
        end = buffer.offset
        records = [dnslib.RR.parse(buffer) for _ in range(others)]
    except Exception:
        # dnslib promises no closed set of exceptions for what strangers send.
        raise RefusedError(_bare(data, dnslib.RCODE.FORMERR)) from None
    if buffer.remaining():
        raise RefusedError(_bare(data, dnslib.RCODE.FORMERR))
    return question, end, records


def _bare(data: bytes, rcode: int) -> bytes:
    """A header and nothing else: never longer than what was asked."""
    flags = 0x8000 | (data[2] & 0x79) << 8 | rcode & 0x0F
    return data[:2] + flags.to_bytes(2, "big") + bytes(8)


def _bad_version(data: bytes, end: int) -> bytes:
    header = _header(data, _RESPONSE, dnslib.RCODE.NOERROR, (0, 0, 1))
    return header + data[HEADER_BYTES:end] + _option(_RCODE_BADVERS >> 4)


def _answer(zone: zones.Zone, data: bytes) -> bytes | None:
    """Put together by hand: the question as it was spelled, and at most one record that points at it."""
    try:
        question = parse(data)
    except RefusedError as refused:
        return refused.reply
    found = zone.lookup(question.name, question.type)
    if found.kind is zones.Kind.OUTSIDE:
        return refuse(data)
    has_records = found.kind is zones.Kind.RECORDS
    rcode = dnslib.RCODE.NXDOMAIN if found.kind is zones.Kind.NO_NAME else dnslib.RCODE.NOERROR
    counts = (int(has_records), int(not has_records), int(question.has_edns))
    option = _option() if question.has_edns else b""
    header = _header(data, _RESPONSE | _AUTHORITATIVE, rcode, counts)
    return header + data[HEADER_BYTES : question.end] + _record(zone, found) + option


def _header(data: bytes, flags: int, rcode: int, counts: tuple[int, int, int]) -> bytes:
    """Of a reply to one question; whether recursion was desired comes back."""
    flags |= (data[2] & 1) << 8 | rcode
    return data[:2] + struct.pack("!5H", flags, 1, *counts)


def _record(zone: zones.Zone, found: zones.Answer) -> bytes:
    if found.kind is not zones.Kind.RECORDS:
        return _packed(_name(found.apex), zones.Type.SOA, zones.NEGATIVE_TTL_S, _soa(zone))
    match found.type:
        case zones.Type.A | zones.Type.AAAA:
            content = (found.address or ipaddress.IPv4Address(0)).packed
        case zones.Type.PTR:
            content = _name(found.target)
        case zones.Type.NS:
            content = _SERVER
        case _:
            content = _soa(zone)
    return _packed(_ASKED, found.type, zones.TTL_S, content)


def _packed(name: bytes, kind: int, ttl: int, content: bytes) -> bytes:
    return name + struct.pack("!HHIH", kind, dnslib.CLASS.IN, ttl, len(content)) + content


def _option(extended_rcode: int = 0) -> bytes:
    """Where other records have their class, it says how long a packet may be."""
    return b"\0" + struct.pack("!HHIH", dnslib.QTYPE.OPT, PAYLOAD_BYTES, extended_rcode << 24, 0)


def _name(labels: zones.Labels) -> bytes:
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def _soa(zone: zones.Zone) -> bytes:
    """Its last number is the life of negative answers (RFC 2308). There is no second server to refresh."""
    return _SERVER + _MAILBOX + struct.pack("!5I", zone.serial, 3600, 600, 86400, zones.NEGATIVE_TTL_S)


_SERVER: Final = _name((b"localhost",))
_MAILBOX: Final = _name((b"nobody", b"localhost"))
