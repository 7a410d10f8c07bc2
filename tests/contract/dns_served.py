# SPDX-License-Identifier: MIT
"""DNS servers on loopback for the tests: ours, and one that plays the host's resolver."""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
from collections.abc import AsyncIterator, Callable

import dnslib

from banger.net import dns
from tests.contract import publishing

LOOPBACK = ipaddress.IPv4Address("127.0.0.1")


@contextlib.asynccontextmanager
async def serving(handler: dns.Handler) -> AsyncIterator[dns.Server]:
    """On a free port."""
    server = dns.Server(LOOPBACK, publishing.free_port(), handler)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def port_of(server: dns.Server) -> int:
    return int(server.endpoint.rpartition(":")[2])


def dig(server: dns.Server, *arguments: str) -> str:
    """The real client's words; it waits 20 s and does not ask twice."""
    argv = ["dig", f"@{LOOPBACK}", "-p", str(port_of(server)), "+tries=1", "+time=20", *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=50).stdout


def upstream(
    records: dict[str, str], seen: list[str], spoil: Callable[[bytes], bytes] = bytes
) -> dns.Handler:
    """Answers like a resolver of the host's, from lines of a zone file by name."""

    def handle(data: bytes, _peer: str, tcp: bool) -> bytes:
        asked = dnslib.DNSRecord.parse(data)
        name = str(asked.q.qname).lower()
        seen.append(f"{name} {'tcp' if tcp else 'udp'}")
        reply = asked.reply(ra=1, aa=0)
        found = dnslib.RR.fromZone(records.get(name, ""))
        if asked.q.qtype in {each.rtype for each in found}:
            reply.add_answer(*found)
        elif name not in records:
            reply.header.rcode = dnslib.RCODE.NXDOMAIN
        packed = bytes(reply.pack())
        if not tcp and len(packed) > 512:
            reply.rr, reply.header.tc = [], 1
            packed = bytes(reply.pack())
        return spoil(packed)

    return handle
