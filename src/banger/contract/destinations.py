# SPDX-License-Identifier: MIT
"""How people write where a guest may go: networks and names, perhaps with a port. Pure."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import msgspec

from banger.contract import egress, errors

_PORT: Final = re.compile("[0-9]{1,5}")
_NAME: Final = (
    r"^(?=.{1,253}$)(\*\.)?([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
)
_HINT: Final = (
    "use an address, a network such as 10.1.0.0/16, or a name, and perhaps :PORT behind it; "
    "IPv6 with a port goes in brackets, such as [2001:db8::/32]:443"
)


_PORTS: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443, "ssh": 22, "ftp": 21, "git": 9418}


class NamedDestination(msgspec.Struct, frozen=True):
    """A name in the DNS; `*.` in front also means every name below."""

    name: str
    port: egress.Port = 0


def parse(text: str) -> egress.Destination | NamedDestination:
    """`CIDR[:PORT]`, `[CIDR]:PORT` for IPv6, or `NAME[:PORT]`. Raises BadRequestError."""
    plain = text.strip().lower()
    if url := re.fullmatch(r"([a-z][a-z0-9+.-]*)://(?:[^/?#@]*@)?([^/?#]+).*", plain):
        raise _is_url(text, *url.groups())
    if plain.startswith("[") or plain.count(":") > 1:
        return _parse6(text, plain)
    host, colon, port_text = plain.partition(":")
    port = _port(text, port_text) if colon else 0
    if not re.search(r"[a-z]", host):
        try:
            return egress.Destination(str(ipaddress.IPv4Network(host)), port)
        except ValueError as error:
            raise errors.BadRequestError(f"{text!r} is not a destination: {error}", hint=_HINT) from None
    if not re.fullmatch(_NAME, host.rstrip(".")):
        raise errors.BadRequestError(f"{text!r} is not a destination", hint=_HINT)
    return NamedDestination(host.rstrip("."), port)


def _is_url(text: str, scheme: str, host: str) -> errors.BadRequestError:
    """Says what to write instead, where that can be said."""
    has_port = re.search(r":[0-9]+$", host)
    port = "" if has_port or scheme not in _PORTS else f":{_PORTS[scheme]}"
    return errors.BadRequestError(
        f"{text!r} is a URL, and addresses and ports are all that is looked at",
        hint=f"write {host}{port}: every path there is allowed with it",
    )


def _parse6(text: str, plain: str) -> egress.Destination:
    network, bracket, port_text = plain.removeprefix("[").partition("]")
    if bool(bracket) != plain.startswith("[") or (port_text and not port_text.startswith(":")):
        raise errors.BadRequestError(f"{text!r} is not a destination", hint=_HINT)
    try:
        found = ipaddress.IPv6Network(network)
    except ValueError as error:
        raise errors.BadRequestError(f"{text!r} is not a destination: {error}", hint=_HINT) from None
    return egress.Destination(str(found), _port(text, port_text[1:]) if port_text else 0)


def opened(
    nat: bool | None, mode: egress.Egress | None, allow: tuple[str, ...]
) -> tuple[bool, egress.Egress]:
    """NAT and its mode, of the words of one request: on a new VM and on one that is changed.

    Who names a destination or a mode wants NAT; who names nothing but destinations, only them.
    """
    wants_nat = nat if nat is not None else bool(allow or mode)
    named_alone = bool(allow) and not nat
    return wants_nat, mode or (egress.Egress.NONE if named_alone else egress.Egress.INTERNET)


def networks(rules: tuple[str, ...]) -> tuple[egress.Destination, ...]:
    """Those of the rules that are networks."""
    return tuple(found for found in map(parse, rules) if isinstance(found, egress.Destination))


def named(rules: tuple[str, ...]) -> tuple[NamedDestination, ...]:
    """Those of the rules that are names."""
    return tuple(found for found in map(parse, rules) if isinstance(found, NamedDestination))


def is_ipv6(rule: egress.Destination) -> bool:
    return ":" in rule.cidr


def _port(text: str, port: str) -> int:
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise errors.BadRequestError(f"{text!r} does not end in a port from 1 to 65535", hint=_HINT)
    return int(port)
