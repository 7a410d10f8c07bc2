# SPDX-License-Identifier: MIT
"""What the DNS says of running VMs, as frozen data: `NAME.vm`, everything below it, and the way back.

Pure. A zone is made anew from the VMs that run; nothing is ever changed in one.
"""

from __future__ import annotations

import enum
import functools
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from banger.contract import names

Labels = tuple[bytes, ...]

TOP: Final = names.DNS_TOP.encode()
TTL_S: Final = 5
"""A VM may stop at any time; resolvers on this host ask again soon."""
NEGATIVE_TTL_S: Final = 1
"""A VM that is asked for too early is there a moment later."""
_REVERSE: Final[Labels] = (b"in-addr", b"arpa")
_REVERSE6: Final[Labels] = (b"ip6", b"arpa")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Kind(enum.Enum):
    """What there is to say."""

    RECORDS = enum.auto()
    NO_DATA = enum.auto()
    """The name exists, records of this type do not."""
    NO_NAME = enum.auto()
    OUTSIDE = enum.auto()
    """Not our zone: we are not the one to ask."""


class Type(enum.IntEnum):
    """The record types that the zone knows. Others have no data."""

    A = 1
    NS = 2
    SOA = 6
    PTR = 12
    AAAA = 28
    ANY = 255


@dataclass(frozen=True, slots=True)
class Answer:
    """`apex` is the zone's own name, for the SOA; `address` and `target` are what A, AAAA and PTR hold."""

    kind: Kind
    apex: Labels = ()
    type: Type = Type.A
    address: Address | None = None
    target: Labels = ()


OUTSIDE: Final = Answer(Kind.OUTSIDE)


@dataclass(frozen=True, slots=True)
class Zone:
    """Made with `of`. `serial` grows with each change, as a SOA's does."""

    network: ipaddress.IPv4Network
    serial: int
    addresses: Mapping[bytes, ipaddress.IPv4Address]
    vms: Mapping[Address, bytes]
    addresses6: Mapping[bytes, ipaddress.IPv6Address]
    network6: ipaddress.IPv6Network

    def lookup(self, name: Labels, wanted: int) -> Answer:
        """`name` in lower case, without the root's empty label."""
        if name[-1:] == (TOP,):
            return self._forward(name, wanted)
        if name[-2:] == _REVERSE:
            return self._backward(name, wanted)
        if name[-2:] == _REVERSE6:
            return self._backward6(name, wanted)
        return OUTSIDE

    def _forward(self, name: Labels, wanted: int) -> Answer:
        apex = (TOP,)
        if len(name) == 1:
            return _of_apex(apex, wanted)
        address = self.addresses.get(name[-2])
        if address is None:
            return Answer(Kind.NO_NAME, apex)
        if wanted in (Type.A, Type.ANY):
            return Answer(Kind.RECORDS, apex, Type.A, address=address)
        address6 = self.addresses6.get(name[-2])
        if wanted == Type.AAAA and address6 is not None:
            return Answer(Kind.RECORDS, apex, Type.AAAA, address=address6)
        return Answer(Kind.NO_DATA, apex)

    def _backward(self, name: Labels, wanted: int) -> Answer:
        apex = name[-5:]
        if apex not in _apexes(self.network):
            return OUTSIDE
        if len(name) == 5:
            return _of_apex(apex, wanted)
        address = _address(name)
        if address is not None and address not in self.network:
            return OUTSIDE
        return self._of_address(address, apex, wanted)

    def _backward6(self, name: Labels, wanted: int) -> Answer:
        apex = _apex6(self.network6)
        if name[-len(apex) :] != apex:
            return OUTSIDE
        if len(name) == len(apex):
            return _of_apex(apex, wanted)
        if _is_above(name):
            return Answer(Kind.NO_DATA, apex)
        return self._of_address(_address6(name), apex, wanted)

    def _of_address(self, address: Address | None, apex: Labels, wanted: int) -> Answer:
        vm = None if address is None else self.vms.get(address)
        if vm is None:
            return Answer(Kind.NO_NAME, apex)
        if wanted in (Type.PTR, Type.ANY):
            return Answer(Kind.RECORDS, apex, Type.PTR, target=(vm, TOP))
        return Answer(Kind.NO_DATA, apex)


def of(
    vms: Iterable[tuple[str, ipaddress.IPv4Address]],
    network: ipaddress.IPv4Network,
    *,
    serial: int,
    sixes: Iterable[tuple[str, ipaddress.IPv6Address]] = (),
    network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6,
) -> Zone:
    """The zone of these VMs, each a name and its address; `sixes` are those that have IPv6 besides."""
    pairs = [(name.encode(), address) for name, address in vms]
    pairs6 = [(name.encode(), address) for name, address in sixes]
    backward: dict[Address, bytes] = {address: name for name, address in pairs}
    backward |= {address: name for name, address in pairs6}
    return Zone(network, serial, dict(pairs), backward, dict(pairs6), network6)


def is_local(
    name: Labels, network: ipaddress.IPv4Network, network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6
) -> bool:
    """Whether a zone of these networks answers for the name, whatever it holds."""
    return of((), network, serial=0, network6=network6).lookup(name, Type.ANY).kind is not Kind.OUTSIDE


def _of_apex(apex: Labels, wanted: int) -> Answer:
    if wanted in (Type.SOA, Type.ANY):
        return Answer(Kind.RECORDS, apex, Type.SOA)
    if wanted == Type.NS:
        return Answer(Kind.RECORDS, apex, Type.NS)
    return Answer(Kind.NO_DATA, apex)


@functools.lru_cache(maxsize=4)
def _apexes(network: ipaddress.IPv4Network) -> frozenset[Labels]:
    """A reverse zone ends at an octet: one for each /24 that the network touches."""
    return frozenset(tuple(zone.encode().split(b".")) for zone in names.reverse_zones(network))


def _address(name: Labels) -> ipaddress.IPv4Address | None:
    """None unless the name is that of one address."""
    if len(name) != 6:
        return None
    try:
        return ipaddress.IPv4Address(".".join(label.decode() for label in reversed(name[:4])))
    except ValueError:
        return None


@functools.lru_cache(maxsize=4)
def _apex6(network: ipaddress.IPv6Network) -> Labels:
    return tuple(names.reverse_zone6(network).encode().split(b"."))


def _is_above(name: Labels) -> bool:
    """Between the zone and an address: such a name exists, as there are names below it."""
    return len(name) < 34 and all(len(label) == 1 and label in b"0123456789abcdef" for label in name[:-2])


def _address6(name: Labels) -> ipaddress.IPv6Address | None:
    """None unless the name is that of one address."""
    nibbles = b"".join(reversed(name[:-2]))
    if len(name) != 34 or len(nibbles) != 32:
        return None
    try:
        return ipaddress.IPv6Address(bytes.fromhex(nibbles.decode()))
    except ValueError:
        return None
