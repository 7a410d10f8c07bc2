# SPDX-License-Identifier: MIT
"""DNS of guests with real packets: from the bridge's port 53 to the daemon's server; others stay outside."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import dnslib
import pytest

from banger.contract import errors, names
from banger.net import dns, forwarder
from tests.root import helper_world, network_world
from tests.root.network_world import BRIDGE, Net

pytestmark = pytest.mark.usefixtures("own_network")


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        yield made


async def _ask_nobody(*_: object, **__: object) -> tuple[bytes, object]:
    raise errors.UnavailableError("no resolver")


@contextmanager
def served(forwarding: forwarder.Forwarder) -> Iterator[None]:
    """The server runs in the thread's loop while another thread's test goes on: sockets are the host's."""
    loop = asyncio.new_event_loop()
    server = dns.Server(ipaddress.IPv4Address(BRIDGE), names.DNS_PORT, forwarding.handle)
    loop.run_until_complete(server.start(not_there_yet=True, device=names.BRIDGE))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=10)
        loop.close()


def guests_of(net: Net) -> list[forwarder.Guest]:
    return [
        forwarder.Guest(each.vm_id, f"vm{each.slot}", each.slot, ipaddress.IPv4Address(each.address))
        for each in net.guests
    ]


def dig(space: network_world.Namespace, *arguments: str) -> str:
    return space.run("dig", f"@{BRIDGE}", "+short", "+tries=2", "+time=5", *arguments).strip()


def test_a_guest_asks_the_bridge_by_udp_and_tcp(net: Net) -> None:
    one, two = net.guest(1), net.guest(2)
    forwarding = forwarder.Forwarder(net.world.policy.prefix, _ask_nobody, _ask_nobody)  # type: ignore[arg-type]
    forwarding.update(guests_of(net), serial=1)
    with served(forwarding):
        assert dig(one.space, "vm1.vm") == one.address
        assert dig(one.space, "+tcp", "vm1.vm") == one.address
        assert dig(one.space, "vm2.vm") == ""
        assert dig(two.space, "-x", two.address) == "vm2.vm."


class Heard(forwarder.Forwarder):
    """Who was heard."""

    def __init__(self, net: Net) -> None:
        super().__init__(net.world.policy.prefix, _ask_nobody, _ask_nobody)  # type: ignore[arg-type]
        self.peers: list[str] = []

    def handle(self, data: bytes, peer: str, tcp: bool) -> None:
        self.peers.append(peer)


def test_who_sends_in_a_guests_name_from_elsewhere_is_not_heard(net: Net) -> None:
    one, two = net.guest(1), net.guest(2)
    for link in ("all", "uplink0"):
        network_world.run("sysctl", "-qw", f"net.ipv4.conf.{link}.rp_filter=0")
    net.internet.ip("addr", "add", f"{two.address}/32", "dev", "lo")
    heard, query = Heard(net), bytes(dnslib.DNSRecord.question("vm1.vm").pack())
    with served(heard):
        outside = net.wire(socket.AF_INET, socket.SOCK_DGRAM, space=net.internet)
        outside.bind((two.address, 0))
        outside.sendto(query, (BRIDGE, names.DNS_PORT))
        inside = net.wire(socket.AF_INET, socket.SOCK_DGRAM, space=one.space)
        inside.sendto(query, (BRIDGE, 53))
        network_world.until(lambda: bool(heard.peers), "the guest was not heard")
    assert heard.peers == [one.address]
