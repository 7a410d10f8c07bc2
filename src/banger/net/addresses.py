# SPDX-License-Identifier: MIT
"""The networks that guests get: whether this host routes them already, and which ones it does not.

Used by installation and doctor, which run without the helper.
"""

from __future__ import annotations

import hashlib
import ipaddress
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from banger.contract import errors, names

Network = ipaddress.IPv4Network
Network6 = ipaddress.IPv6Network
TABLE: Final = Path("/proc/net/route")
TABLES: Final = Path("/proc/net/fib_trie")
TABLE6: Final = Path("/proc/net/ipv6_route")
_PREFIX_LENGTH: Final = 20
_NO_LINK: Final = "*"
"""Where a route refuses what it is for."""
_RTF_REJECT: Final = 0x200
_SHORTEST6: Final = 16
"""A shorter route is for all local prefixes together: whatever we choose is within, and takes precedence."""
_PROPOSALS6: Final = 64


class Route(NamedTuple):
    link: str
    """Or the table, where the kernel does not say which link."""
    network: Network | Network6


def routes(table: Path = TABLE) -> list[Route]:
    """What the kernel's main table says, without default routes. Source: Linux, net/ipv4/fib_trie.c."""
    found = []
    for line in table.read_text().splitlines()[1:]:
        link, destination, *rest = line.split()
        mask = rest[5]
        network = Network((_address(destination), str(_address(mask))))
        if network.prefixlen and link != _NO_LINK:
            found.append(Route(link, network))
    return found


def policy_routes(tables: Path = TABLES) -> list[Route]:
    """Those of tables that rules lead to, such as a VPN's. Source: Linux, net/ipv4/fib_trie.c."""
    if not tables.exists():
        return []
    found, table, leaf = [], "", ""
    for line in tables.read_text().splitlines():
        first, *rest = line.split()
        if not line.startswith(" "):
            table = f"table {rest[0].rstrip(':')}" if first == "Id" else ""
        elif first == "|--":
            leaf = rest[0]
        elif table and first.startswith("/") and first != "/0" and rest[1] == "UNICAST":
            found.append(Route(table, Network(f"{leaf}{first}")))
    return found


def routes6(table: Path = TABLE6) -> list[Route]:
    """What the kernel's tables say; nothing without IPv6. Source: Linux, net/ipv6/route.c."""
    if not table.exists():
        return []
    found = []
    for line in table.read_text().splitlines():
        destination, length, *_, flags, link = line.split()
        network = Network6((bytes.fromhex(destination), int(length, 16)))
        if network.prefixlen >= _SHORTEST6 and not int(flags, 16) & _RTF_REJECT:
            found.append(Route(link, network))
    return found


def check(network: Network, found: Iterable[Route]) -> None:
    """Raises ConflictError, with a network that is free, when another link leads to part of this one."""
    taken = [route for route in found if route.link != names.BRIDGE]
    for route in taken:
        if route.network.overlaps(network):
            raise _overlap(network, route, f"--network {free(taken)}")


def check6(network: Network6, found: Iterable[Route]) -> None:
    """The same for IPv6."""
    taken = [route for route in found if route.link != names.BRIDGE]
    for route in taken:
        if route.network.overlaps(network):
            raise _overlap(network, route, f"--network6 {_free6(network, taken)}")


def _overlap(network: Network | Network6, route: Route, option: str) -> errors.ConflictError:
    return errors.ConflictError(
        f"network {network} overlaps {route.network}, which this host reaches by {route.link}",
        hint=f"install with another one: `{option}`",
    )


def _free6(network: Network6, found: Iterable[Route]) -> Network6:
    """Always the same one for the same host."""
    taken = [route.network for route in found]
    for number in range(_PROPOSALS6):
        candidate = derived_network6(f"{network} {number}")
        if not any(candidate.overlaps(each) for each in taken):
            return candidate
    raise errors.ConflictError("this host routes every local prefix", hint="name one with --network6")


def free(found: Iterable[Route]) -> Network:
    """The default network, or the nearest of its size that no route overlaps."""
    taken = [route.network for route in found]
    for candidate in _candidates():
        if not any(candidate.overlaps(network) for network in taken):
            return candidate
    raise errors.ConflictError(
        "every private network is routed by this host", hint="name one with --network"
    )


def _candidates() -> Iterator[Network]:
    first = Network(names.NETWORK)
    yield first
    for outer in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"):
        subnets = list(Network(outer).subnets(new_prefix=_PREFIX_LENGTH))
        # From the top: people and their tools number from the bottom.
        yield from (each for each in reversed(subnets) if each != first)


def _address(text: str) -> ipaddress.IPv4Address:
    """The kernel prints an address as the number its bytes are on this machine."""
    return ipaddress.IPv4Address(int(text, 16).to_bytes(4, sys.byteorder))


def derived_network6(seed: str) -> ipaddress.IPv6Network:
    """A unique local prefix (RFC 4193) that is always the same for the same seed."""
    global_id = hashlib.sha256(f"banger {seed}".encode()).digest()[:5]
    return ipaddress.IPv6Network((b"\xfd" + global_id + bytes(10), 64))
