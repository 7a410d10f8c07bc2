# SPDX-License-Identifier: MIT
"""Ports of a guest: those it listens on, and those its host offers. Pure.

A port that is offered is written `[ADDR:]HOSTPORT:GUESTPORT[/udp]`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from banger.contract import errors, resources

MAX_PUBLISHED: Final = 32
_FORM: Final = re.compile(
    r"(?:(?P<address>[0-9.]+):)?(?P<host>\d{1,5}):(?P<guest>\d{1,5})(?:/(?P<protocol>tcp|udp))?"
)
_HOST_PORT: Final = re.compile(r"(?P<host>\d{1,5})(?:/(?P<protocol>tcp|udp))?")
_HINT: Final = "such as 8080:80, 0.0.0.0:8080:80 or 5353:53/udp"


@dataclass(frozen=True, slots=True)
class Publish:
    """What comes to a port of the host goes to one of the guest."""

    address: str
    host_port: int
    guest_port: int
    protocol: str

    def __str__(self) -> str:
        return f"{self.address}:{self.host_port}:{self.guest_port}/{self.protocol}"

    @property
    def place(self) -> str:
        """Where the host listens; two of one VM cannot share it."""
        return f"{self.address}:{self.host_port}/{self.protocol}"


def parse(text: str) -> Publish:
    """On loopback unless an address is given. Raises BadRequestError."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise errors.BadRequestError(f"{text!r} is not HOSTPORT:GUESTPORT", hint=_HINT)
    host, guest = int(found["host"]), int(found["guest"])
    if not (1 <= host <= 65535 and 1 <= guest <= 65535):
        raise errors.BadRequestError(f"{text!r} names a port that is not from 1 to 65535", hint=_HINT)
    try:
        address = str(ipaddress.IPv4Address(found["address"] or "127.0.0.1"))
    except ValueError:
        raise errors.BadRequestError(f"{text!r} begins with no IPv4 address", hint=_HINT) from None
    return Publish(address, host, guest, found["protocol"] or "tcp")


def parse_all(texts: tuple[str, ...]) -> tuple[Publish, ...]:
    """Each place once. Raises BadRequestError."""
    found = tuple(map(parse, texts))
    places = [each.place for each in found]
    twice = next((place for place in places if places.count(place) > 1), "")
    if twice:
        raise errors.BadRequestError(f"port {twice} of this host is published twice")
    if len(found) > MAX_PUBLISHED:
        raise errors.BadRequestError(f"{len(found)} ports are more than {MAX_PUBLISHED}")
    return found


def named(text: str, published: Sequence[Publish]) -> list[Publish]:
    """Those of them that are meant: one as it was published, or all at `HOSTPORT[/udp]`.

    Raises BadRequestError for what is neither.
    """
    found = _HOST_PORT.fullmatch(text)
    if found is None:
        whole = parse(text)
        return [each for each in published if each == whole]
    asked, protocol = int(found["host"]), found["protocol"]
    return [each for each in published if each.host_port == asked and protocol in (None, each.protocol)]


class ChangePorts(resources.Body, frozen=True, kw_only=True):
    """Of a running VM at once, else from its next start. What is not there is taken back silently."""

    publish: tuple[str, ...] = ()
    unpublish: tuple[str, ...] = ()


class GuestPort(resources.Resource, frozen=True, kw_only=True):
    """A socket that listens in a guest; or a port of it that is published, and nothing listens there."""

    protocol: str
    address: str
    """Empty when nothing listens."""
    port: int
    pid: int
    """0 when no process was found."""
    process: str
    target: str = ""
    """Where the host reaches it; empty when it listens on the guest's loopback, or the VM has no network."""
    published: tuple[str, ...] = ()
    """`ADDR:PORT` of the host each."""
    url: str = ""
    """When it answers HTTP and the host reaches it."""
