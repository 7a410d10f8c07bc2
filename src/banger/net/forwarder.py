# SPDX-License-Identifier: MIT
"""DNS for guests, at the bridge's address: their own names from us, other names from the host's resolvers.

Only guests that run are answered, each within its own rate. A guest hears of itself and of those it shares a
network with; names beyond go out only for guests with NAT, and as far as their egress policy says. The
addresses of a name that the policy allows are opened before the guest learns them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Final

from banger.contract import destinations, egress, errors, names
from banger.net import wire
from banger.net import zone as zones

_log = logging.getLogger(__name__)

_RATE: Final = 200.0
"""Questions a second for each guest; twice as many at once."""
_PENDING: Final = 64
"""Questions of one guest that wait for an answer from outside."""
_MAX_ADDRESSES: Final = 64
_MIN_OPEN_S: Final = 60
_OPENED_S: Final = 10.0
"""How long what was opened is not opened again: far less than it lasts."""
_MAX_OPEN_S: Final = 86400
_SLACK_S: Final = 1.0
"""Resolvers count whole seconds."""
_OPENING: Final = 4.0
"""As many questions as root's work for one of them counts."""

Ask = Callable[..., Awaitable[tuple[bytes, wire.Reply]]]


@dataclass(frozen=True, slots=True)
class Guest:
    """A running guest, as its row says: `forward` is NAT, `everything` a policy that asks for no names."""

    id: str
    name: str
    slot: int
    address: ipaddress.IPv4Address
    address6: ipaddress.IPv6Address | None = None
    peers: str = ""
    """Guests of one network reach each other; empty: it has none."""
    forward: bool = False
    everything: bool = True
    allowed: Sequence[destinations.NamedDestination] = ()


Open = Callable[[Guest, Sequence[str], int, int], Awaitable[None]]
"""Opens addresses for a guest, for seconds, at a port (0: any)."""


@dataclass(slots=True)
class _Seen:
    """One guest's share."""

    respond: Callable[[bytes], bytes | None]
    tokens: float = 2 * _RATE
    at: float = field(default_factory=time.monotonic)
    pending: int = 0
    opened: dict[tuple[tuple[str, ...], int], tuple[float, float]] = field(default_factory=dict)
    """Since when, and until when."""
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Root is asked for one thing of a guest's after the other, so that others are heard in between."""

    def take(self) -> bool:
        now = time.monotonic()
        self.tokens = min(2 * _RATE, self.tokens + (now - self.at) * _RATE)
        self.at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Forwarder:
    """`handle` is the handler of a `dns.Server`. `update` says who runs now."""

    def __init__(
        self,
        network: ipaddress.IPv4Network,
        ask: Ask,
        opened: Open,
        network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6,
    ) -> None:
        self._network = network
        self._network6 = network6
        self._ask = ask
        self._open = opened
        self._guests: dict[str, Guest] = {}
        self._seen: dict[str, _Seen] = {}
        self._serial = 0

    def update(self, guests: Sequence[Guest], *, serial: int) -> None:
        self._serial = serial
        self._guests = {str(guest.address): guest for guest in guests}
        before, self._seen = self._seen, {}
        for address, guest in self._guests.items():
            seen = before.get(address)
            respond = wire.responder(self._zone_of(guest))
            self._seen[address] = seen if seen is not None else _Seen(respond)
            self._seen[address].respond = respond
            self._seen[address].opened.clear()  # rules that were set anew have forgotten it

    def _zone_of(self, guest: Guest) -> zones.Zone:
        told = [
            other
            for other in self._guests.values()
            if other is guest or (guest.peers and other.peers == guest.peers)
        ]
        return zone_of(told, self._network, self._network6, serial=self._serial)

    def changing(self, guest_id: str) -> contextlib.AbstractAsyncContextManager[object]:
        """Nothing is opened for a guest inside the block; then only what its policy is by then."""
        of_it = (self._seen[address] for address, guest in self._guests.items() if guest.id == guest_id)
        seen = next(of_it, None)
        return contextlib.nullcontext() if seen is None else seen.opening

    def handle(
        self, data: bytes, peer: str, tcp: bool
    ) -> bytes | Coroutine[None, None, bytes | None] | None:
        guest, seen = self._guests.get(peer), self._seen.get(peer)
        if guest is None or seen is None or not seen.take():
            return None  # silence: who is no guest learns not even that we are here
        try:
            question = wire.parse(data)
        except wire.RefusedError as refused:
            return refused.reply
        if zones.is_local(question.name, self._network, self._network6):
            return seen.respond(data)
        if not self._may_ask(guest, question) or seen.pending >= _PENDING:
            return wire.refuse(data)
        return self._forward(guest, seen, data, question, tcp)

    def _may_ask(self, guest: Guest, question: wire.Question) -> bool:
        return guest.forward and (
            guest.everything or any(_covers(each.name, question.name) for each in guest.allowed)
        )

    async def _forward(
        self, guest: Guest, seen: _Seen, data: bytes, question: wire.Question, tcp: bool
    ) -> bytes | None:
        seen.pending += 1
        try:
            reply, said = await self._ask(data, question, tcp=tcp)
            seen.tokens -= len(reply) / wire.PAYLOAD_BYTES  # a long one is as much work as many
            await self._open_addresses(guest, seen, question, said)
        except errors.BangerError as error:
            _log.debug("could not answer a guest", extra={"vm": guest.id, "error": error.message})
            return wire.fail(data)
        finally:
            seen.pending -= 1
        return reply if tcp else wire.fit(reply, question)

    async def _open_addresses(
        self, guest: Guest, seen: _Seen, question: wire.Question, said: wire.Reply
    ) -> None:
        """A guest that connects at once finds the way open. One that asks again and again costs little."""
        outside = (text for text in said.addresses if self._is_outside(guest, text))
        addresses = tuple(sorted(outside))[:_MAX_ADDRESSES]
        ports = {each.port for each in guest.allowed if _covers(each.name, question.name)}
        life = max(_MIN_OPEN_S, min(said.ttl_s, _MAX_OPEN_S))
        now = time.monotonic()
        seen.opened = {key: times for key, times in seen.opened.items() if times[0] > now - _OPENED_S}
        for port in sorted(ports) if addresses else ():
            async with seen.opening:
                if self._guests.get(str(guest.address)) != guest:
                    raise errors.ConflictError("what the guest may reach has changed meanwhile")
                _, until = seen.opened.get((addresses, port), (0.0, 0.0))
                if until < now + min(said.ttl_s, _MAX_OPEN_S) - _SLACK_S:
                    seen.tokens -= _OPENING
                    await self._open(guest, addresses, life, port)
                    seen.opened[addresses, port] = now, now + life

    def _is_outside(self, guest: Guest, text: str) -> bool:
        """Whoever answers for an allowed name could name the host, other guests or the cloud's metadata."""
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address):
            is_ours = address in self._network6
            return guest.address6 is not None and egress.is_nameable(address) and not is_ours
        return egress.is_nameable(address) and address not in self._network


def zone_of(
    guests: Sequence[Guest],
    network: ipaddress.IPv4Network,
    network6: ipaddress.IPv6Network,
    *,
    serial: int,
) -> zones.Zone:
    """What there is to say of these guests."""
    pairs = [(guest.name, guest.address) for guest in guests]
    sixes = [(guest.name, guest.address6) for guest in guests if guest.address6 is not None]
    return zones.of(pairs, network, serial=serial, sixes=sixes, network6=network6)


def _covers(name: str, labels: zones.Labels) -> bool:
    """`*.` in front means every name below too."""
    wanted = tuple(part.encode() for part in name.removeprefix("*.").split("."))
    below = name.startswith("*.") and labels[-len(wanted) :] == wanted
    return labels == wanted or below
