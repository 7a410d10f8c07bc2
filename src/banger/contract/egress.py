# SPDX-License-Identifier: MIT
"""What a guest may reach beyond its host: a mode, and destinations allowed besides. Pure.

Root judges by this. How people write a destination is `destinations`, which root does not load.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import Annotated, Final

import msgspec

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
