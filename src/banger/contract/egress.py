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
CIDR_PATTERN: Final = r"^[0-9]{1,3}(\.[0-9]{1,3}){3}/[0-9]{1,2}$(?!\n)"
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""0 means any."""
_NAME: Final = re.compile(
    r"^(?=.{1,253}$)(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
)
_HINT: Final = "use an address, a network such as 10.1.0.0/16, or a name, and perhaps :PORT behind it"


class Egress(enum.StrEnum):
    """Where a guest with NAT may go. Link-local addresses (cloud metadata) are in neither."""

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
    """`CIDR[:PORT]` or `NAME[:PORT]`. Raises BadRequestError."""
    host, colon, port_text = text.strip().lower().partition(":")
    port = _port(text, port_text) if colon else 0
    if not re.search(r"[a-z]", host):
        try:
            return Destination(str(ipaddress.IPv4Network(host)), port)
        except ValueError as error:
            raise errors.BadRequestError(f"{text!r} is not a destination: {error}", hint=_HINT) from None
    if not _NAME.fullmatch(host.rstrip(".")):
        raise errors.BadRequestError(f"{text!r} is not a destination", hint=_HINT)
    return NamedDestination(host.rstrip("."), port)


def destinations(rules: tuple[str, ...]) -> tuple[Destination, ...]:
    """Those of the rules that are networks."""
    return tuple(found for found in map(parse, rules) if isinstance(found, Destination))


def named(rules: tuple[str, ...]) -> tuple[NamedDestination, ...]:
    """Those of the rules that are names."""
    return tuple(found for found in map(parse, rules) if isinstance(found, NamedDestination))


def _port(text: str, port: str) -> int:
    if not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise errors.BadRequestError(f"{text!r} does not end in a port from 1 to 65535", hint=_HINT)
    return int(port)
