# SPDX-License-Identifier: MIT
"""Names of running VMs for this host and for guests: both DNS servers, and the host's resolver told of them.

The servers start all or nothing, before the daemon is ready. That the host's resolver cannot be told is no
reason to serve nobody: it is shown in `banger system status`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final

from banger.contract import destinations, egress, errors, names, privileged, resources
from banger.net import dns, forwarder, upstream, wire
from banger.owner import config
from banger.vm import record

_log = logging.getLogger(__name__)

_OFF: Final = "switched off by `dns_listen` in config.toml"
_OTHER_PORT: Final = (
    f"only {names.DNS_ADDRESS}:{names.DNS_PORT} is routed by itself; see docs/dns.md for other resolvers"
)


class Naming:
    """`add` and `remove` are idempotent; every change makes the zone anew."""

    def __init__(
        self,
        settings: config.Config,
        network: ipaddress.IPv4Network,
        bridge: str,
        ops: privileged.PrivilegedOps,
        *,
        network6: ipaddress.IPv6Network = names.DEFAULT_NETWORK6,
    ) -> None:
        self._settings = settings
        self._network6 = network6
        self._network = network
        self._bridge = bridge
        self._ops = ops
        self._running: dict[names.VmId, forwarder.Guest] = {}
        self._serials = itertools.count(1)
        self._upstream = upstream.Upstream(self._servers)
        self._forwarder = forwarder.Forwarder(network, self._upstream.ask, self._open, network6)
        self._host: dns.Server | None = None
        self._guests: dns.Server | None = None
        self._routed_link = 0
        self._problem = ""
        self._respond = self._responder()

    # --- who runs ---

    def add(self, vm: record.VmRecord) -> None:
        """Runs from now on, or its policy has changed."""
        if vm.network:
            self._running[vm.id] = self._guest(vm)
            self._changed()

    def remove(self, vm_id: names.VmId) -> None:
        if self._running.pop(vm_id, None) is not None:
            self._changed()

    def changing(self, vm_id: names.VmId) -> contextlib.AbstractAsyncContextManager[object]:
        """While its rules are set, nothing is opened by those before; `add` says what holds then."""
        return self._forwarder.changing(vm_id)

    def _guest(self, vm: record.VmRecord) -> forwarder.Guest:
        return forwarder.Guest(
            id=vm.id,
            name=vm.name,
            slot=vm.slot,
            address=names.guest_address(self._network, vm.slot),
            address6=names.guest_address6(self._network6, vm.slot) if vm.ipv6 else None,
            peers=vm.peers,
            forward=vm.nat,
            everything=vm.egress is not egress.Egress.NONE,
            allowed=destinations.named(vm.allow),
        )

    async def _open(self, guest: forwarder.Guest, addresses: Sequence[str], ttl_s: int, port: int) -> None:
        await self._ops.call(
            privileged.AllowAddresses(
                vm_id=guest.id, slot=guest.slot, addresses=tuple(addresses), ttl_s=ttl_s, port=port
            )
        )

    def _changed(self) -> None:
        self._respond = self._responder()

    def _responder(self) -> Callable[[bytes], bytes | None]:
        serial = next(self._serials)
        guests = list(self._running.values())
        self._forwarder.update(guests, serial=serial)
        return wire.responder(forwarder.zone_of(guests, self._network, self._network6, serial=serial))

    # --- the servers ---

    async def start(self) -> None:
        """Raises ConflictError, and leaves nothing bound, when a port is taken."""
        listen = self._settings.dns_endpoint
        if listen is None:
            self._problem = _OFF
            return
        address, port = listen
        host = dns.Server(ipaddress.IPv4Address(address), port, lambda data, *_: self._respond(data))
        await host.start()
        if self._settings.dns_guests:
            here = names.bridge_address(self._network)
            guests = dns.Server(here, names.DNS_PORT, self._forwarder.handle)
            try:
                # The bridge may be made later, and others than guests must not reach its address.
                await guests.start(not_there_yet=True, device=self._bridge)
            except BaseException:
                await host.close()
                raise
            self._guests = guests
        self._host = host
        _log.info("dns ready", extra={"listen": host.endpoint, "guests": self._settings.dns_guests})

    async def close(self) -> None:
        """Whoever asks for a VM from now on must not wait for us."""
        if self._routed_link:
            try:
                await self._ops.call(privileged.UnrouteResolver())
            except errors.BangerError as error:
                _log.warning("the host's resolver still asks us", extra={"error": error.message})
        for server in (self._host, self._guests):
            if server is not None:
                await server.close()

    # --- the host's resolver ---

    async def ensure_routed(self) -> None:
        """Once for each bridge: a new one has a new number. What fails is kept for `status`, logged once."""
        link = _link_number(self._bridge)
        if self._host is None or not self._settings.dns_route or not link or link == self._routed_link:
            return
        if self._host.endpoint != f"{names.DNS_ADDRESS}:{names.DNS_PORT}":
            self._problem = _OTHER_PORT
            return
        try:
            problem = (await self._ops.call(privileged.RouteResolver())).problem
        except errors.BangerError as error:
            problem = error.message
        if problem and problem != self._problem:
            _log.warning("the host does not resolve names of VMs by itself", extra={"problem": problem})
        self._problem = problem
        self._routed_link = 0 if problem else link

    def status(self) -> resources.DnsStatus:
        settings = self._settings
        return resources.DnsStatus(
            listen=self._host.endpoint if self._host else "",
            listen_source=settings.source_of("dns_listen"),
            guests=self._guests.endpoint if self._guests else "",
            upstream=tuple(map(upstream.text_of, self._servers())),
            upstream_source=settings.source_of("dns_upstream"),
            routed=self._routed_link != 0,
            problem=self._problem,
        )

    def _servers(self) -> Sequence[upstream.Endpoint]:
        """Asked at each question: a laptop changes its network."""
        if self._settings.dns_upstream:
            return [upstream.parse_endpoint(text) for text in self._settings.dns_upstream]
        return upstream.of_host(never=[str(names.bridge_address(self._network))])


def names_closed(settings: config.Config, network: ipaddress.IPv4Network) -> str:
    """Why a guest is never told by us which addresses a name stands for; empty when it is."""
    if settings.dns_endpoint is None:
        return "`dns_listen` is empty"
    if not settings.dns_guests:
        return "`dns_guests` is false"
    if settings.dns and str(names.bridge_address(network)) not in settings.dns:
        return f"by `dns` guests ask {', '.join(settings.dns)}"
    return ""


def _link_number(name: str) -> int:
    """0 when there is no such link."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
