# SPDX-License-Identifier: MIT
"""DNS of guests with real packets: from the bridge's port 53 to the daemon's server; others stay outside."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import dnslib
import pytest

from banger.contract import destinations, errors, names, privileged
from banger.helper import ruleset
from banger.net import dns, forwarder, upstream
from tests.root import helper_world, network_world, packets
from tests.root.network_world import BRIDGE, INTERNET, Net

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


@contextmanager
def resolver(net: Net, name: str, address: str, ttl_s: int) -> Iterator[upstream.Upstream]:
    """A real DNS server in the internet, which the host asks; it knows one name."""
    plain = ("--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--no-resolv", "--no-hosts")
    where = (f"--listen-address={INTERNET}", "--bind-interfaces", "--user=root")
    own = (f"--host-record={name},{address},{ttl_s}", f"--local-ttl={ttl_s}")
    with net.internet.entered():
        process = subprocess.Popen(["dnsmasq", *plain, *where, *own])
    asking = net.wire(socket.AF_INET, socket.SOCK_DGRAM)
    asking.setblocking(False)
    asking.connect((INTERNET, 53))

    def answers() -> bool:
        try:
            asking.send(bytes(dnslib.DNSRecord.question(name).pack()))
            return bool(network_world.received(asking))
        except ConnectionRefusedError:
            return False

    try:
        network_world.until(answers, "the resolver did not come up")
        yield upstream.Upstream(lambda: [(INTERNET, 53)])
    finally:
        process.terminate()
        process.wait(timeout=10)


def allowing(
    net: Net, guest: network_world.Guest, name: str, asking: upstream.Upstream
) -> forwarder.Forwarder:
    """Opens what it finds by the helper's own operation."""

    async def opened(who: forwarder.Guest, addresses: Sequence[str], ttl_s: int, port: int) -> None:
        net.ask(
            privileged.AllowAddresses(
                vm_id=who.id, slot=who.slot, addresses=tuple(addresses), ttl_s=ttl_s, port=port
            )
        )

    made = forwarder.Forwarder(net.world.policy.prefix, asking.ask, opened)
    (row,) = guests_of(net)
    allowed = destinations.named((name,))
    made.update([dataclasses.replace(row, forward=True, everything=False, allowed=allowed)], serial=1)
    return made


def named_for(net: Net) -> list[int]:
    """For how many seconds each opened address was opened."""
    return [
        each.timeout_s
        for each in ruleset.elements()
        if each.set in (ruleset.REACH[4].named, ruleset.REACH[4].named_ports)
    ]


def test_an_allowed_name_opens_what_a_real_server_says_for_as_long_as_that_holds(
    net: Net,
) -> None:
    other = "203.0.113.77"
    net.internet.ip("addr", "add", f"{other}/32", "dev", "lo")
    guest = net.guest(1, nat=True, egress="none")
    net.tcp_server(other, 443, net.internet)
    with (
        resolver(net, "api.example.org", other, 300) as asking,
        served(allowing(net, guest, "api.example.org:443", asking)),
    ):
        assert not network_world.connects(guest.space, other, 443, timeout_s=0.5)
        assert dig(guest.space, "other.example.org") == ""
        assert dig(guest.space, "api.example.org") == other
        assert network_world.connects(guest.space, other, 443)
        assert named_for(net) == [300]


def test_an_address_is_closed_when_its_record_has_ended(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute at least, in earnest; here, what the record says."""
    monkeypatch.setattr(forwarder, "_MIN_OPEN_S", 1)
    other = "203.0.113.77"
    net.internet.ip("addr", "add", f"{other}/32", "dev", "lo")
    guest = net.guest(1, nat=True, egress="none")
    send, arrived = packets.udp(net, guest, other, at=net.internet)
    with (
        resolver(net, "api.example.org", other, 2) as asking,
        served(allowing(net, guest, "api.example.org", asking)),
    ):
        assert network_world.fate(net, send, arrived) == "egress_policy"
        assert dig(guest.space, "api.example.org") == other
        assert network_world.fate(net, send, arrived) == "arrived"
        network_world.until(
            lambda: network_world.fate(net, send, arrived) == "egress_policy", "it was never closed"
        )


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
