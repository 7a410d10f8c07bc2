# SPDX-License-Identifier: MIT
"""The same for IPv6, which a guest has on request: each rule drops and counts, and passes without it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from banger.contract import errors, names, privileged
from banger.helper import ruleset
from banger.helper.linux import netlink
from tests.root import helper_world, network_world, packets
from tests.root.network_world import BRIDGE6, GATEWAY6, INTERNET6, METADATA6, PRIVATE6, UPLINK6, Guest, Net

pytestmark = pytest.mark.usefixtures("own_network")
OTHER = "fd62:616e:6765:7200::99"
OTHER_MAC = bytes.fromhex("060000000099")
ALL_NODES = bytes.fromhex("333300000001")


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        yield made


def to_host(net: Net, guest: Guest, packet: bytes, to: bytes = packets.BRIDGE_MAC) -> packets.Try:
    head = to + packets.packed(guest.mac) + b"\x86\xdd"
    return packets.frame(net, guest, head + packet), packets.sniffed(net, "br-fc", packet)


def six(source: str, target: str, data: bytes = b"six!") -> bytes:
    body = struct.pack("!HHHH", 7001, 7000, 8 + len(data), 0) + data
    return packets.ipv6(17, body, source=source, target=target, hops=64)


def link_local(guest: Guest) -> str:
    return str(names.link_local(names.VmId(guest.vm_id)))


# --- one packet for each reason to drop ---


def a_service_of_the_host(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True), BRIDGE6, at=None)


def a_service_at_the_hosts_other_address(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True), UPLINK6, at=None)


def the_internet_without_nat(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True), INTERNET6, at=net.internet)


def the_metadata_service(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True, nat=True), METADATA6, at=net.internet)


def the_metadata_service_from_everywhere(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True, nat=True, egress="all"), METADATA6, at=net.internet)


def a_private_network(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, ipv6=True, nat=True), PRIVATE6, at=net.internet)


def what_is_not_allowed(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True, nat=True, egress="none", allow=(GATEWAY6, "0.0.0.0/0"))
    return packets.udp(net, guest, INTERNET6, at=net.internet)


def another_port_than_allowed(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True, nat=True, egress="none", allow=(f"[{INTERNET6}]:7001",))
    return packets.udp(net, guest, INTERNET6, at=net.internet)


def a_guest_from_outside(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True, nat=True)
    server = net.udp_server(guest.address6, 7000, guest.space)
    client = net.wire(socket.AF_INET6, socket.SOCK_DGRAM, space=net.internet)
    return lambda: client.sendto(b"x", (guest.address6, 7000)), lambda: bool(network_world.received(server))


def a_spoofed_source(net: Net) -> packets.Try:
    return to_host(net, net.guest(1, ipv6=True), six(OTHER, BRIDGE6))


def another_hardware_address(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    packet = six(guest.address6, BRIDGE6)
    frame = packets.BRIDGE_MAC + OTHER_MAC + b"\x86\xdd" + packet
    return packets.frame(net, guest, frame), packets.sniffed(net, "br-fc", packet)


def the_bridges_own_address(net: Net) -> packets.Try:
    return to_host(net, net.guest(1, ipv6=True), six("fe80::fc:ff:fe00:1", "ff02::1"), ALL_NODES)


def more_than_neighbour_discovery_from_the_links_address(net: Net) -> packets.Try:
    """So that no fragment, which hides what it carries, looks like a router's."""
    guest = net.guest(1, ipv6=True)
    return to_host(net, guest, six(link_local(guest), "ff02::1"), ALL_NODES)


def a_router_advertisement(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    body = struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    return to_host(net, guest, packets.ipv6(58, body, source=link_local(guest)), ALL_NODES)


def a_redirect(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    better, target = (socket.inet_pton(socket.AF_INET6, each) for each in (link_local(guest), INTERNET6))
    body = struct.pack("!BBHI", 137, 0, 0, 0) + better + target
    return to_host(net, guest, packets.ipv6(58, body, source=link_local(guest)), ALL_NODES)


def a_question_who_listens(net: Net) -> packets.Try:
    """Whoever asks it is the router for multicast."""
    guest = net.guest(1, ipv6=True)
    body = struct.pack("!BBHHH16x", 130, 0, 0, 1000, 0)
    return to_host(net, guest, packets.ipv6(58, body, source=link_local(guest), hops=1), ALL_NODES)


def a_question_for_a_router(net: Net) -> packets.Try:
    body = struct.pack("!BBHI", 133, 0, 0, 0)
    return to_routers(net, body, "333300000002", "ff02::2")


def a_listener(net: Net) -> packets.Try:
    body = struct.pack("!BBHHH", 131, 0, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, "ff02::77")
    return to_routers(net, body, "333300000077", "ff02::77")


def a_listener_as_kernels_are_today(net: Net) -> packets.Try:
    body = struct.pack("!BBHHHBBH", 143, 0, 0, 0, 1, 4, 0, 0) + socket.inet_pton(socket.AF_INET6, "ff02::77")
    return to_routers(net, body, "333300000016", "ff02::16")


def to_routers(net: Net, body: bytes, mac: str, target: str) -> packets.Try:
    """Of a guest whose own kernel says nothing by itself."""
    guest = net.guest(1)
    net.rules(guest, ipv6=True)
    packet = packets.ipv6(58, body, source=link_local(guest), target=target)
    return to_host(net, guest, packet, bytes.fromhex(mac))


def an_answer_for_another_guest(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(136, OTHER, packets.packed(guest.mac))
    return to_host(net, guest, packets.ipv6(58, body, source=guest.address6, target=BRIDGE6))


def an_answer_for_the_bridge(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(136, BRIDGE6, packets.packed(guest.mac))
    return to_host(net, guest, packets.ipv6(58, body, source=link_local(guest)), ALL_NODES)


def an_answer_in_anothers_name(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(136, OTHER, packets.packed(guest.mac))
    return to_host(net, guest, packets.ipv6(58, body, source=OTHER), ALL_NODES)


def an_answer_with_another_hardware_address_inside(net: Net) -> packets.Try:
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(136, guest.address6, OTHER_MAC)
    return to_host(net, guest, packets.ipv6(58, body, source=guest.address6, target=BRIDGE6))


def a_question_in_anothers_name(net: Net) -> packets.Try:
    """Whoever is asked remembers who asked."""
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(135, BRIDGE6, packets.packed(guest.mac))
    return to_host(net, guest, packets.ipv6(58, body, source=OTHER, target="ff02::1:ff00:1"), ALL_NODES)


def a_claim_of_anothers_address(net: Net) -> packets.Try:
    """From nobody: is it taken? The one who has it would give it up, or not take it at all."""
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(135, OTHER, None)
    return to_host(net, guest, packets.ipv6(58, body, source="::", target="ff02::1:ff00:99"), ALL_NODES)


def a_guest_without_ipv6(net: Net) -> packets.Try:
    net.guest(2, ipv6=True)
    return to_host(net, net.guest(1), six("fd62:616e:6765:7200::2", BRIDGE6))


def another_guest_through_the_bridge(net: Net) -> packets.Try:
    one, other = net.guest(1, ipv6=True, peers="one"), net.guest(2, ipv6=True, peers="other")
    data = packets.packed(other.mac) + packets.packed(one.mac) + b"\x86\xdd"
    packet = six(one.address6, other.address6)
    return packets.frame(net, one, data + packet), packets.sniffed(net, "eth0", packet, other.space)


def another_guest_through_the_host(net: Net) -> packets.Try:
    one = net.guest(1, ipv6=True, nat=True, egress="all")
    other = net.guest(2, ipv6=True, nat=True)
    head = packets.BRIDGE_MAC + packets.packed(one.mac) + b"\x86\xdd"
    packet = six(one.address6, other.address6, b"through the host")
    seen = packets.sniffed(net, "eth0", b"through the host", other.space)
    return packets.frame(net, one, head + packet), seen


def a_service_of_the_host_around_the_bridge(net: Net) -> packets.Try:
    """A guest that has no IPv6 at all, from an address it made up, in a frame for bridges themselves."""
    guest, server = net.guest(1), net.udp_server(UPLINK6, 7000)
    head = packets.FOR_BRIDGES + packets.packed(guest.mac) + b"\x86\xdd"
    send = packets.frame(net, guest, head + six(OTHER, UPLINK6, b"x"))
    return send, lambda: network_world.received(server) == b"x"


CASES: list[tuple[Callable[[Net], packets.Try], str, tuple[str, ...]]] = [
    (a_service_of_the_host, "host_service", ()),
    (a_service_at_the_hosts_other_address, "host_service", ()),
    (a_service_of_the_host_around_the_bridge, "around_bridge", ()),
    (the_internet_without_nat, "no_nat", ("egress_policy",)),
    (the_metadata_service, "metadata", ("private_network",)),
    (the_metadata_service_from_everywhere, "metadata", ()),
    (a_private_network, "private_network", ()),
    (what_is_not_allowed, "egress_policy", ()),
    (another_port_than_allowed, "egress_policy", ()),
    (a_guest_from_outside, "inbound_new", ()),
    (a_spoofed_source, "spoofed", ()),
    (another_hardware_address, "spoofed", ()),
    (the_bridges_own_address, "ipv6_frame", ("spoofed",)),
    (more_than_neighbour_discovery_from_the_links_address, "ipv6_frame", ("spoofed",)),
    (a_router_advertisement, "router_advertisement", ("ipv6_frame", "spoofed")),
    (a_redirect, "router_advertisement", ("ipv6_frame", "spoofed")),
    (a_question_who_listens, "router_advertisement", ("ipv6_frame", "spoofed")),
    (a_question_for_a_router, "to_routers", ("ipv6_frame",)),
    (a_listener, "to_routers", ("ipv6_frame",)),
    (a_listener_as_kernels_are_today, "to_routers", ("ipv6_frame",)),
    (an_answer_for_another_guest, "spoofed_ndp", ()),
    (an_answer_for_the_bridge, "spoofed_ndp", ()),
    (an_answer_in_anothers_name, "spoofed_ndp", ()),
    (an_answer_with_another_hardware_address_inside, "spoofed_ndp", ()),
    (a_question_in_anothers_name, "spoofed_ndp", ()),
    (a_claim_of_anothers_address, "spoofed_ndp", ()),
    (a_guest_without_ipv6, "ipv6_frame", ("spoofed",)),
    (another_guest_through_the_bridge, "guest_to_guest", ()),
    (another_guest_through_the_host, "hairpin", ("inbound_new",)),
]
"""A packet, the reason that counts it, and further rules that would drop it for another reason."""


@pytest.mark.parametrize(("packet", "reason", "also"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_is_dropped_and_counted_and_passes_without_the_rule(
    net: Net, packet: Callable[[Net], packets.Try], reason: str, also: tuple[str, ...]
) -> None:
    packets.check_dropped_and_counted(net, packet, reason, also)


# --- what works ---

ALLOWED: list[tuple[str, dict[str, Any]]] = [
    (INTERNET6, {}),
    (INTERNET6, {"egress": "all"}),
    (PRIVATE6, {"egress": "all"}),
    (PRIVATE6, {"allow": ("fd77::/64",)}),
    (METADATA6, {"allow": (METADATA6,)}),
    (INTERNET6, {"egress": "none", "allow": (INTERNET6, "2001:db8:77::/64", "[2001:db8::/32]:80")}),
    (INTERNET6, {"egress": "none", "allow": ("[::/0]:7000", f"[{INTERNET6}]:7000", "10.0.0.0/8")}),
]


@pytest.mark.parametrize(("target", "asked"), ALLOWED)
def test_what_is_asked_for_is_reached(net: Net, target: str, asked: dict[str, Any]) -> None:
    """There and back: a connection, from the uplink's address. Nothing of it was counted as dropped."""
    guest = net.guest(1, ipv6=True, nat=True, **asked)
    before = net.drops()
    server = net.tcp_server(target, 7000, net.internet)
    assert network_world.connects(guest.space, target, 7000)
    wire, peer = server.accept()
    wire.close()
    assert peer[0] == UPLINK6
    assert net.drops() == before


def test_the_host_reaches_guests_though_it_has_to_ask_who_they_are(net: Net) -> None:
    guest = net.guest(1, ipv6=True)
    net.tcp_server(guest.address6, 22, guest.space)
    network_world.run("ip", "-6", "neigh", "flush", "dev", "br-fc")
    socket.create_connection((guest.address6, 22), timeout=network_world.DEADLINE_S).close()


def test_a_guest_may_ask_whether_its_own_address_is_taken(net: Net) -> None:
    guest = net.guest(1, ipv6=True)
    body = packets.neighbour(135, guest.address6, None)
    send, arrived = to_host(net, guest, packets.ipv6(58, body, source="::"), ALL_NODES)
    assert network_world.fate(net, send, arrived) == "arrived"


def test_an_echo_from_the_bridge_is_answered(net: Net) -> None:
    guest = net.guest(1, ipv6=True)
    wire = net.wire(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, space=guest.space)
    wire.setblocking(False)
    wire.sendto(struct.pack("!BBHHH", 128, 0, 0, 7, 1), (BRIDGE6, 0))
    heard: list[int] = []

    def answered() -> bool:
        heard.extend(network_world.received(wire)[:1])
        return 129 in heard

    network_world.until(answered, "no echo came back")


def test_peers_of_one_network_reach_each_other_alone(net: Net) -> None:
    one, two = net.guest(1, ipv6=True, peers="shop"), net.guest(2, ipv6=True, peers="shop")
    other = net.guest(3, ipv6=True, peers="bank")
    server = net.tcp_server(two.address6, 80, two.space)
    assert network_world.connects(one.space, two.address6, 80)
    assert not network_world.connects(other.space, two.address6, 80, timeout_s=0.5)
    server.close()


def test_a_resolved_name_is_reached_for_its_time(net: Net) -> None:
    guest = net.guest(1, ipv6=True, nat=True, egress="none")
    send, arrived = packets.udp(net, guest, INTERNET6, at=net.internet)
    assert network_world.fate(net, send, arrived) == "egress_policy"
    both = (INTERNET6, network_world.INTERNET)
    net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=both, ttl_s=3600))
    assert network_world.fate(net, send, arrived) == "arrived"
    net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=both, ttl_s=1))
    network_world.until(lambda: network_world.fate(net, send, arrived) == "egress_policy", "it never ended")


@pytest.mark.parametrize(
    "text", [METADATA6, "::1", "fe80::1", "::ffff:10.0.0.1", "2002:a00:1::1", "ff02::1"]
)
def test_a_name_may_not_stand_for_what_is_the_hosts(net: Net, text: str) -> None:
    guest = net.guest(1, ipv6=True, nat=True)
    with pytest.raises(errors.BadRequestError, match="may not stand for"):
        net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=(text,), ttl_s=60))


def test_the_bridge_has_addresses_while_a_guest_has_one(net: Net) -> None:
    def there() -> list[str]:
        bridge = netlink.find("br-fc")
        assert bridge is not None
        return sorted(
            each.local for each in netlink.addresses(socket.AF_INET6) if each.link == bridge.number
        )

    four = net.guest(1, nat=True)
    assert there() == []
    one, two = net.guest(2, ipv6=True), net.guest(3, ipv6=True)
    assert there() == [BRIDGE6, "fe80::fc:ff:fe00:1"]
    net.unplug(one)
    network_world.run("ip", "addr", "del", f"{BRIDGE6}/64", "dev", "br-fc")
    net.ask(privileged.EnsureBridge())
    assert there() == [BRIDGE6, "fe80::fc:ff:fe00:1"]
    net.unplug(two)
    assert there() == []
    net.unplug(four)
    assert not [each for each in ruleset.elements() if each.owner]


@pytest.mark.parametrize("route", ["fd62:616e:6765::/48", "fd62:616e:6765:7200::9/128"])
def test_a_prefix_that_leads_elsewhere_is_refused(net: Net, route: str) -> None:
    network_world.run("ip", "route", "add", route, "via", GATEWAY6)
    with pytest.raises(errors.ConflictError, match=route):
        net.guest(1, ipv6=True)
    network_world.run("ip", "route", "del", route)
    network_world.run("ip", "route", "add", "fc00::/7", "via", GATEWAY6)
    network_world.run("ip", "route", "add", "unreachable", route)
    net.guest(2, ipv6=True)
    net.guest(3, ipv6=True)


def test_a_host_without_ipv6_says_so(net: Net) -> None:
    network_world.run("sysctl", "-qw", "net.ipv6.conf.br-fc.disable_ipv6=1")
    with pytest.raises(errors.ConflictError, match="switched off"):
        net.guest(1, ipv6=True)
    net.guest(2)


def test_a_prefix_that_the_host_has_elsewhere_is_refused(net: Net) -> None:
    network_world.run("ip", "addr", "add", "fd62:616e:6765:7200::5/48", "dev", "uplink0", "nodad")
    with pytest.raises(errors.ConflictError, match="overlaps"):
        net.guest(1, ipv6=True)


def test_what_the_host_forwards_anyway_goes_on(net: Net) -> None:
    """NAT lends IPv4 forwarding to the uplink and drops what strangers send by it; IPv6 is not lent."""
    net.guest(1, nat=True)
    other = network_world.Namespace()
    net.plug_lan(other, "2001:db8:9::1", "2001:db8:9::9")
    server = net.udp_server("2001:db8:9::9", 7000, other)
    client = net.wire(socket.AF_INET6, socket.SOCK_DGRAM, space=net.internet)
    net.internet.ip("route", "add", "2001:db8:9::/64", "via", UPLINK6)
    send, arrived = (
        lambda: client.sendto(b"x", ("2001:db8:9::9", 7000)),
        lambda: bool(network_world.received(server)),
    )
    assert network_world.fate(net, send, arrived) == "arrived"
