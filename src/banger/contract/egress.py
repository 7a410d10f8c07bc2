# SPDX-License-Identifier: MIT
"""What a guest may reach beyond its host: a mode, and destinations allowed besides. Pure."""

from __future__ import annotations

import enum
import ipaddress
import re
from typing import Annotated, Final

import msgspec

from banger.contract import errors

MAX_RULES: Final = 64
CIDR_PATTERN: Final = r"^([0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}|[0-9a-f:]{2,39}/[0-9]{1,3})$(?!\n)"
LINK_LOCAL: Final = ipaddress.IPv4Network("169.254.0.0/16")
METADATA: Final = (
    LINK_LOCAL,
    *map(ipaddress.IPv4Network, ("168.63.129.16", "100.100.100.200", "192.0.0.192")),
)
"""Where most clouds, then Azure, Alibaba and Oracle, keep what belongs to the host."""
LINK_LOCAL6: Final = ipaddress.IPv6Network("fe80::/10")
METADATA6: Final = tuple(map(ipaddress.IPv6Network, ("fd00:ec2::254", "fd20:ce::254", "fd00:42::42")))
"""Where AWS, Google and Scaleway keep what belongs to the host."""
WRAPPED6: Final = tuple(map(ipaddress.IPv6Network, ("2001::/32", "2002::/16")))
"""Teredo and 6to4: an IPv4 address inside, of whatever network."""
_GLOBAL6: Final = ipaddress.IPv6Network("2000::/3")
_UNIQUE_LOCAL6: Final = ipaddress.IPv6Network("fc00::/7")
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""0 means any."""
_NAME: Final = (
    r"^(?=.{1,253}$)(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
)
_HINT: Final = (
    "use an address, a network such as 10.1.0.0/16, or a name, and perhaps :PORT behind it; "
    "IPv6 with a port goes in brackets, such as [2001:db8::/32]:443"
)


class Egress(enum.StrEnum):
    """Where a guest with NAT may go. The clouds' metadata is in neither."""

    NONE = "none"
    """Nowhere but to what is allowed by name or network."""
    INTERNET = "internet"
    """Public addresses."""
    ALL = "all"
    """Private ones too."""


class Destination(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network, all of it or one port of its hosts (TCP and UDP)."""

    cidr: Annotated[str, msgspec.Meta(pattern=CIDR_PATTERN)]
    port: Port = 0


class NamedDestination(msgspec.Struct, frozen=True):
    """A name in the DNS; `*.` in front also means every name below."""

    name: str
    port: Port = 0


def parse(text: str) -> Destination | NamedDestination:
    """`CIDR[:PORT]`, `[CIDR]:PORT` for IPv6, or `NAME[:PORT]`. Raises BadRequestError."""
    plain = text.strip().lower()
    if plain.startswith("[") or plain.count(":") > 1:
        return _parse6(text, plain)
    host, colon, port_text = plain.partition(":")
    port = _port(text, port_text) if colon else 0
    if not re.search(r"[a-z]", host):
        try:
            return Destination(str(ipaddress.IPv4Network(host)), port)
        except ValueError as error:
            raise errors.BadRequestError(f"{text!r} is not a destination: {error}", hint=_HINT) from None
    if not re.fullmatch(_NAME, host.rstrip(".")):
        raise errors.BadRequestError(f"{text!r} is not a destination", hint=_HINT)
    return NamedDestination(host.rstrip("."), port)


def _parse6(text: str, plain: str) -> Destination:
    network, bracket, port_text = plain.removeprefix("[").partition("]")
    if bool(bracket) != plain.startswith("[") or (port_text and not port_text.startswith(":")):
        raise errors.BadRequestError(f"{text!r} is not a destination", hint=_HINT)
    try:
        found = ipaddress.IPv6Network(network)
    except ValueError as error:
        raise errors.BadRequestError(f"{text!r} is not a destination: {error}", hint=_HINT) from None
    return Destination(str(found), _port(text, port_text[1:]) if port_text else 0)


def destinations(rules: tuple[str, ...]) -> tuple[Destination, ...]:
    """Those of the rules that are networks."""
    return tuple(found for found in map(parse, rules) if isinstance(found, Destination))


def named(rules: tuple[str, ...]) -> tuple[NamedDestination, ...]:
    """Those of the rules that are names."""
    return tuple(found for found in map(parse, rules) if isinstance(found, NamedDestination))


def is_nameable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether a name that a policy allows may stand for it: whoever answers could name anything."""
    if isinstance(address, ipaddress.IPv4Address):
        here = address.is_loopback or address.is_unspecified
        return (
            not here
            and not address.is_multicast
            and not address.is_reserved
            and not any(address in network for network in METADATA)
        )
    refused = any(address in network for network in (*METADATA6, *WRAPPED6))
    return not refused and (address in _GLOBAL6 or address in _UNIQUE_LOCAL6)


def is_ipv6(rule: Destination) -> bool:
    return ":" in rule.cidr


def _port(text: str, port: str) -> int:
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise errors.BadRequestError(f"{text!r} does not end in a port from 1 to 65535", hint=_HINT)
    return int(port)
