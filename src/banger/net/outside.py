# SPDX-License-Identifier: MIT
"""What lies outside of this host and of the networks that it is in: where a stranger may be connected to.

By addresses, which are connected to as they were judged here: a name may stand for another a moment later.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import socket
from collections.abc import Sequence
from typing import Final

from banger.contract import egress

_GLOBAL6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
"""RFC 6052: an IPv4 address inside, as a resolver of a network without IPv4 gives it."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


async def resolve(host: str, port: int) -> list[Address]:
    """What a name or an address means here, each once. Raises OSError for what means nothing."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError("no name can be such") from None
    texts = dict.fromkeys(str(place[0]) for *_, place in found)
    return [ipaddress.ip_address(text) for text in texts]


def in_turns(found: Sequence[Address]) -> list[Address]:
    """One of each family after the other, as RFC 8305 has it: mostly it is a whole family that fails."""
    families = [
        [each for each in found if each.version == one] for one in dict.fromkeys(a.version for a in found)
    ]
    return [each for turn in itertools.zip_longest(*families) for each in turn if each is not None]


def is_outside(address: Address) -> bool:
    """A public address that is none of this host's own, and none where a cloud keeps what belongs to it."""
    return is_public(address) and not _is_here(address)


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        inside = any(address in network for network in egress.METADATA)
        return address.is_global and not address.is_multicast and not inside
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    inside = any(address in network for network in (*egress.METADATA6, *egress.WRAPPED6))
    return address in _GLOBAL6 and address.is_global and not inside


def _is_here(address: Address) -> bool:
    """The kernel takes one of its own addresses as the source on the way to itself; no packet is sent."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((str(address), 9))
        return bool(ipaddress.ip_address(probe.getsockname()[0]) == address)
    return False
