# SPDX-License-Identifier: MIT
"""Packets of guests for tests of the rules: by sockets, or by hand where no kernel would."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final

from banger.contract import names
from tests.root import network_world
from tests.root.network_world import BRIDGE, Guest, Net

Try = tuple[Callable[[], object], Callable[[], bool]]
"""Sends one packet; says whether it arrived."""
BRIDGE_MAC: Final = bytes.fromhex("02fc00000001")
FOR_BRIDGES: Final = bytes.fromhex("0180c200000e")
"""Where LLDP goes."""


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def udp(net: Net, guest: Guest, to: str, port: int = 7000, *, at: network_world.Namespace | None) -> Try:
    """A datagram of the guest's to a server at `at`, the host by default."""
    served = names.DNS_PORT if (to, port) == (BRIDGE, 53) else port
    any_address = "::" if ":" in to else "0.0.0.0"  # noqa: S104 - in a namespace of the test's own
    server = net.udp_server(any_address, served, at)
    client = net.wire(network_world.family_of(to), socket.SOCK_DGRAM, space=guest.space)
    return lambda: client.sendto(b"x", (to, port)), lambda: network_world.received(server) == b"x"


def frame(net: Net, guest: Guest, data: bytes) -> Callable[[], object]:
    wire = net.wire(socket.AF_PACKET, socket.SOCK_RAW, space=guest.space)
    wire.bind(("eth0", 0))
    return lambda: wire.send(data)


def sniffed(
    net: Net, link: str, data: bytes, space: network_world.Namespace | None = None
) -> Callable[[], bool]:
    """Whether a frame came in by this link."""
    wire = net.wire(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3), space=space)
    wire.bind((link, 0))
    wire.setblocking(False)

    def seen() -> bool:
        while got := network_world.received(wire):
            if data in got:
                return True
        return False

    return seen


def datagram(source: str, target: str, data: bytes) -> bytes:
    """An IPv4 packet with a UDP datagram, both checksums right."""
    body = struct.pack("!HHHH", 7001, 7000, 8 + len(data), 0) + data
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(body),
        1,
        0,
        64,
        17,
        0,
        socket.inet_aton(source),
        socket.inet_aton(target),
    )
    words = struct.unpack("!10H", head)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:] + body


def arp(sender_mac: bytes, sender: str, target: str, *, operation: int = 2) -> bytes:
    return struct.pack(
        "!HHBBH6s4s6s4s",
        1,
        0x0800,
        6,
        4,
        operation,
        sender_mac,
        socket.inet_aton(sender),
        bytes(6),
        socket.inet_aton(target),
    )


def ipv6(
    next_header: int, body: bytes, *, source: str = "fe80::99", target: str = "ff02::1", hops: int = 255
) -> bytes:
    """The checksum of UDP and ICMPv6 is put in where it belongs."""
    packed = [socket.inet_pton(socket.AF_INET6, text) for text in (source, target)]
    at = {17: 6, 58: 2}[next_header]
    pseudo = b"".join(packed) + struct.pack("!II", len(body), next_header) + body + bytes(len(body) % 2)
    total = sum(struct.unpack(f"!{len(pseudo) // 2}H", pseudo))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:at] + struct.pack("!H", ~total & 0xFFFF) + body[at + 2 :]
    return struct.pack("!IHBB16s16s", 6 << 28, len(body), next_header, hops, *packed) + body


def neighbour(kind: int, target: str, mac: bytes | None) -> bytes:
    """A neighbour solicitation (135) or an advertisement that overrides (136), with a hardware address."""
    flags = 0x20000000 if kind == 136 else 0
    option = bytes([kind - 134, 1]) + mac if mac is not None else b""
    return struct.pack("!BBHI", kind, 0, 0, flags) + socket.inet_pton(socket.AF_INET6, target) + option


def check_dropped_and_counted(
    net: Net, packet: Callable[[Net], Try], reason: str, also: tuple[str, ...]
) -> None:
    """It is dropped for the reason, and passes without its rule and those that would drop it for another."""
    send, arrived = packet(net)
    assert network_world.fate(net, send, arrived) == reason
    network_world.remove_rules(reason, *also)
    assert network_world.fate(net, send, arrived) == "arrived"
