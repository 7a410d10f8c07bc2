# SPDX-License-Identifier: MIT
"""The network that guests get: whether this host routes it already, and which one it does not.

Used by installation and doctor, which run without the helper.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from banger.contract import errors, names

Network = ipaddress.IPv4Network
_TABLE: Final = Path("/proc/net/route")
_PREFIX_LENGTH: Final = 20


class Route(NamedTuple):
    link: str
    network: Network


def routes(table: Path = _TABLE) -> list[Route]:
    """What the kernel's main table says, without default routes. Source: Linux, net/ipv4/fib_trie.c."""
    found = []
    for line in table.read_text().splitlines()[1:]:
        link, destination, *rest = line.split()
        mask = rest[5]
        network = Network((_address(destination), str(_address(mask))))
        if network.prefixlen:
            found.append(Route(link, network))
    return found


def check(network: Network, found: Iterable[Route]) -> None:
    """Raises ConflictError, with a network that is free, when another link leads to part of this one."""
    taken = [route for route in found if route.link != names.BRIDGE]
    for route in taken:
        if route.network.overlaps(network):
            raise errors.ConflictError(
                f"network {network} overlaps {route.network}, which this host reaches by {route.link}",
                hint=f"install with another one: `--network {free(taken)}`",
            )


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
