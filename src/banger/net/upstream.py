# SPDX-License-Identifier: MIT
"""Asking the host's own resolvers: a fresh port and id for each question; only its own answer counts."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.net import wire

RESOLV_CONF: Final = Path("/etc/resolv.conf")
PORT: Final = 53
_TRY_S: Final = 2.0
_MAX_SERVERS: Final = 3
_MAX_CONF_BYTES: Final = 65536
_MAX_NOISE: Final = 64
"""Packets that are not the answer, before a try is given up."""

Endpoint = tuple[str, int]


def parse_endpoint(text: str) -> Endpoint:
    """`ADDRESS`, `ADDRESS:PORT` or `[IPV6]:PORT`. Raises ValueError."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text)), PORT
    address, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{text!r} is no IP address")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{text!r} does not end in a port")
    if address.startswith("[") and address.endswith("]"):
        return str(ipaddress.IPv6Address(address[1:-1])), int(port)
    return str(ipaddress.IPv4Address(address)), int(port)


def of_host(path: Path = RESOLV_CONF, *, never: Sequence[str] = ()) -> tuple[Endpoint, ...]:
    """What the host itself asks, in order; `never` are addresses at which we would ask ourselves."""
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONF_BYTES).decode(errors="replace")
    except OSError:
        return ()
    found = [
        line.split()[1]
        for line in text.splitlines()
        if line.startswith("nameserver") and len(line.split()) > 1
    ]
    servers = []
    for each in found:
        with contextlib.suppress(ValueError):
            servers.append(str(ipaddress.ip_address(each)))
    return tuple((each, PORT) for each in servers if each not in never)[:_MAX_SERVERS]


def text_of(server: Endpoint) -> str:
    address, port = server
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class Upstream:
    """`servers` is asked at each question: networks change while a daemon runs."""

    def __init__(self, servers: Callable[[], Sequence[Endpoint]]) -> None:
        self._servers = servers

    async def ask(self, data: bytes, question: wire.Question, *, tcp: bool) -> tuple[bytes, wire.Reply]:
        """The reply with the asker's id, and what it says. Raises UnavailableError when nobody answers.

        As for the host itself, one that refuses or fails is passed over where another knows more.
        """
        refusal: tuple[bytes, wire.Reply] | None = None
        for server in self._servers():
            number = secrets.randbelow(65536)
            query = wire.with_id(data, number)
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(_TRY_S):
                    found = await _ask(server, query, question, number, tcp=tcp)
                if found is not None:
                    answer = wire.with_id(found[0], question.id), found[1]
                    if not found[1].is_refusal:
                        return answer
                    refusal = refusal or answer
        if refusal is not None:
            return refusal
        raise errors.UnavailableError("no resolver of this host answered")


async def _ask(
    server: Endpoint, query: bytes, question: wire.Question, number: int, *, tcp: bool
) -> tuple[bytes, wire.Reply] | None:
    if not tcp:
        found = await _by_udp(server, query, question, number)
        if found is None or not found[1].truncated:
            return found
    return await _by_tcp(server, query, question, number)


async def _by_udp(
    server: Endpoint, query: bytes, question: wire.Question, number: int
) -> tuple[bytes, wire.Reply] | None:
    """A connected socket hears its server alone; the kernel gives it a port that nobody can guess."""
    loop = asyncio.get_running_loop()
    # Looks nothing up: it knows the link that an IPv6 address may name.
    found = socket.getaddrinfo(*server, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    family, kind, _, _, address = found[0]
    with socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as udp:
        udp.connect(address)
        udp.send(query)
        for _ in range(_MAX_NOISE):
            data = await loop.sock_recv(udp, wire.MAX_TCP_BYTES)
            reply = wire.read_reply(data, question, number)
            if reply is not None:
                return data, reply
    return None


async def _by_tcp(
    server: Endpoint, query: bytes, question: wire.Question, number: int
) -> tuple[bytes, wire.Reply] | None:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    finally:
        writer.transport.abort()
    reply = wire.read_reply(data, question, number)
    return None if reply is None or reply.truncated else (data, reply)
