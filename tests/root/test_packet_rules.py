# SPDX-License-Identifier: MIT
"""What guests may send, with real packets: each rule drops and counts, and without it the packet passes."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from banger.contract import names, privileged
from banger.helper import tables
from tests.root import helper_world, network_world, packets
from tests.root.network_world import BRIDGE, GATEWAY, INTERNET, METADATA, PRIVATE, UPLINK, Net

pytestmark = pytest.mark.usefixtures("own_network")


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        yield made


# --- one packet for each reason to drop ---


def a_service_of_the_host(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1), BRIDGE, at=None)


def a_service_at_the_hosts_other_address(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1), UPLINK, at=None)


def the_internet_without_nat(net: Net) -> packets.Try:
    net.guest(2, nat=True)  # so that the host forwards at all
    return packets.udp(net, net.guest(1), INTERNET, at=net.internet)


def the_metadata_service(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, nat=True), METADATA, at=net.internet)


def the_metadata_service_at_a_public_address(net: Net) -> packets.Try:
    """Azure's."""
    net.internet.ip("addr", "add", "168.63.129.16/32", "dev", "lo")
    return packets.udp(net, net.guest(1, nat=True), "168.63.129.16", at=net.internet)


def the_metadata_service_from_everywhere(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, nat=True, egress="all"), METADATA, at=net.internet)


def a_private_network(net: Net) -> packets.Try:
    return packets.udp(net, net.guest(1, nat=True), PRIVATE, at=net.internet)


def what_is_not_allowed(net: Net) -> packets.Try:
    return packets.udp(
        net, net.guest(1, nat=True, egress="none", allow=(f"{GATEWAY}",)), INTERNET, at=net.internet
    )


def another_port_than_allowed(net: Net) -> packets.Try:
    allow = (f"{INTERNET}:7001",)
    return packets.udp(net, net.guest(1, nat=True, egress="none", allow=allow), INTERNET, at=net.internet)


def a_guest_from_outside(net: Net) -> packets.Try:
    guest = net.guest(1, nat=True)
    server = net.udp_server(guest.address, 7000, guest.space)
    client = net.wire(socket.AF_INET, socket.SOCK_DGRAM, space=net.internet)
    return lambda: client.sendto(b"x", (guest.address, 7000)), lambda: bool(network_world.received(server))


def another_hosts_packet(net: Net) -> packets.Try:
    """The host forwards for guests now, and not for others."""
    net.guest(1, nat=True)
    other = network_world.Namespace()
    net.plug_lan(other, "192.0.2.1", "192.0.2.9")
    net.internet.ip("route", "add", "192.0.2.0/24", "via", UPLINK)
    server = net.udp_server("192.0.2.9", 7000, other)
    client = net.wire(socket.AF_INET, socket.SOCK_DGRAM, space=net.internet)
    return lambda: client.sendto(b"x", ("192.0.2.9", 7000)), lambda: bool(network_world.received(server))


def a_spoofed_ip_source(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.datagram("10.213.240.99", BRIDGE, b"spoofed-ip")
    head = packets.BRIDGE_MAC + packets.packed(guest.mac) + b"\x08\x00"
    return packets.frame(net, guest, head + data), packets.sniffed(net, "br-fc", b"spoofed-ip")


def a_spoofed_hardware_source(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.datagram(guest.address, BRIDGE, b"spoofed-mac")
    head = packets.BRIDGE_MAC + bytes.fromhex("060000000099") + b"\x08\x00"
    return packets.frame(net, guest, head + data), packets.sniffed(net, "br-fc", b"spoofed-mac")


def a_tagged_frame(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.datagram("10.213.240.99", BRIDGE, b"in-a-vlan")
    head = packets.BRIDGE_MAC + packets.packed(guest.mac) + b"\x81\x00\x00\x01\x08\x00"
    return packets.frame(net, guest, head + data), packets.sniffed(net, "br-fc", b"in-a-vlan")


def arp_for_another_guest(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.arp(packets.packed(guest.mac), "10.213.240.99", BRIDGE)
    return packets.frame(
        net, guest, packets.BRIDGE_MAC + packets.packed(guest.mac) + b"\x08\x06" + data
    ), packets.sniffed(net, "br-fc", data)


def arp_for_the_gateway(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.arp(packets.packed(guest.mac), BRIDGE, BRIDGE)
    return packets.frame(
        net, guest, b"\xff" * 6 + packets.packed(guest.mac) + b"\x08\x06" + data
    ), packets.sniffed(net, "br-fc", data)


def arp_with_another_hardware_address_inside(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.arp(bytes.fromhex("060000000099"), guest.address, BRIDGE)
    return packets.frame(
        net, guest, packets.BRIDGE_MAC + packets.packed(guest.mac) + b"\x08\x06" + data
    ), packets.sniffed(net, "br-fc", data)


def a_router_advertisement(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.ipv6(58, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0))
    return packets.frame(
        net, guest, bytes.fromhex("333300000001") + packets.packed(guest.mac) + b"\x86\xdd" + data
    ), packets.sniffed(net, "br-fc", data)


def other_ipv6(net: Net) -> packets.Try:
    guest = net.guest(1)
    data = packets.ipv6(17, struct.pack("!HHHH", 1, 2, 12, 0) + b"six!")
    return packets.frame(
        net, guest, bytes.fromhex("333300000001") + packets.packed(guest.mac) + b"\x86\xdd" + data
    ), packets.sniffed(net, "br-fc", data)


def another_guest_through_the_bridge(net: Net) -> packets.Try:
    """Both have peers, so that their ports are not isolated; but not the same peers."""
    one, other = net.guest(1, peers="one"), net.guest(2, peers="other")
    data = packets.datagram(one.address, other.address, b"neighbour")
    head = packets.packed(other.mac) + packets.packed(one.mac) + b"\x08\x00"
    return packets.frame(net, one, head + data), packets.sniffed(net, "eth0", b"neighbour", other.space)


def another_guest_through_the_host(net: Net) -> packets.Try:
    one, other = net.guest(1, nat=True, egress="all"), net.guest(2, nat=True)
    data = packets.datagram(one.address, other.address, b"neighbour")
    return packets.frame(
        net, one, packets.BRIDGE_MAC + packets.packed(one.mac) + b"\x08\x00" + data
    ), packets.sniffed(net, "eth0", b"neighbour", other.space)


def a_service_of_the_host_by_a_tap_without_bridge(net: Net) -> packets.Try:
    """Somebody deleted the bridge, or took the tap off it."""
    guest, server = net.guest(1), net.udp_server(UPLINK, 7000)
    return packets.frame(
        net, guest, past_the_bridge(net, guest, UPLINK)
    ), lambda: network_world.received(server) == b"x"


def the_internet_by_a_tap_without_bridge(net: Net) -> packets.Try:
    """Where the host forwards for others too."""
    network_world.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    guest, server = net.guest(1), net.udp_server(INTERNET, 7000, net.internet)
    return packets.frame(
        net, guest, past_the_bridge(net, guest, INTERNET)
    ), lambda: network_world.received(server) == b"x"


def past_the_bridge(net: Net, guest: network_world.Guest, to: str) -> bytes:
    network_world.run("ip", "link", "set", guest.tap, "nomaster")
    (link,) = json.loads(network_world.run("ip", "-j", "link", "show", guest.tap))
    head = packets.packed(link["address"]) + packets.packed(guest.mac) + b"\x08\x00"
    return head + packets.datagram(guest.address, to, b"x")


def a_service_of_the_host_around_the_bridge(net: Net) -> packets.Try:
    """In a frame for bridges themselves: they neither pass it on nor show it to their rules."""
    guest, server = net.guest(1), net.udp_server(UPLINK, 7000)
    head = packets.FOR_BRIDGES + packets.packed(guest.mac) + b"\x08\x00"
    send = packets.frame(net, guest, head + packets.datagram(guest.address, UPLINK, b"x"))
    return send, lambda: network_world.received(server) == b"x"


CASES: list[tuple[Callable[[Net], packets.Try], str, tuple[str, ...]]] = [
    (a_service_of_the_host, "host_service", ()),
    (a_service_at_the_hosts_other_address, "host_service", ()),
    (the_internet_without_nat, "no_nat", ("egress_policy",)),
    (the_metadata_service, "metadata", ()),
    (the_metadata_service_at_a_public_address, "metadata", ()),
    (the_metadata_service_from_everywhere, "metadata", ()),
    (a_private_network, "private_network", ()),
    (what_is_not_allowed, "egress_policy", ()),
    (another_port_than_allowed, "egress_policy", ()),
    (a_guest_from_outside, "inbound_new", ("foreign_transit",)),
    (another_hosts_packet, "foreign_transit", ()),
    (a_spoofed_ip_source, "spoofed", ()),
    (a_spoofed_hardware_source, "spoofed", ()),
    (a_tagged_frame, "spoofed", ()),
    (arp_for_another_guest, "spoofed_arp", ("spoofed",)),
    (arp_for_the_gateway, "spoofed_arp", ("spoofed",)),
    (arp_with_another_hardware_address_inside, "spoofed_arp", ("spoofed",)),
    (a_router_advertisement, "router_advertisement", ("ipv6_frame", "spoofed")),
    (other_ipv6, "ipv6_frame", ("spoofed",)),
    (another_guest_through_the_bridge, "guest_to_guest", ()),
    (another_guest_through_the_host, "hairpin", ("inbound_new",)),
    (a_service_of_the_host_around_the_bridge, "around_bridge", ()),
    (a_service_of_the_host_by_a_tap_without_bridge, "around_bridge", ()),
    (the_internet_by_a_tap_without_bridge, "around_bridge", ()),
]
"""A packet, the reason that counts it, and further rules that would drop it for another reason."""


@pytest.mark.parametrize(("packet", "reason", "also"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_is_dropped_and_counted_and_passes_without_the_rule(
    net: Net, packet: Callable[[Net], packets.Try], reason: str, also: tuple[str, ...]
) -> None:
    packets.check_dropped_and_counted(net, packet, reason, also)


def test_whatever_is_dropped_is_counted_for_a_reason_that_the_page_gives(
    helper_world_here: helper_world.HelperWorld,
) -> None:
    text = tables.text(helper_world_here.policy)
    rules = text.splitlines()
    assert [rule for rule in rules if rule.endswith(" drop") and " counter name " not in rule] == []
    page = Path(__file__).parents[2].joinpath("docs/network.md").read_text()
    reasons = re.findall(r"^ *counter (\w+) \{ \}$", text, re.MULTILINE)
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(reasons)


# --- what works ---


ALLOWED: list[tuple[str, dict[str, Any]]] = [
    (INTERNET, {"nat": True}),
    (INTERNET, {"nat": True, "egress": "all"}),
    (PRIVATE, {"nat": True, "egress": "all"}),
    (PRIVATE, {"nat": True, "allow": ("192.168.77.0/24",)}),
    (METADATA, {"nat": True, "allow": (METADATA,)}),
    (INTERNET, {"nat": True, "egress": "none", "allow": (INTERNET, "203.0.113.0/28", "203.0.113.0/24:80")}),
    (INTERNET, {"nat": True, "egress": "none", "allow": ("0.0.0.0/0:7000", "203.0.113.10:7000")}),
]


@pytest.mark.parametrize(("target", "asked"), ALLOWED)
def test_what_is_asked_for_is_reached(net: Net, target: str, asked: dict[str, Any]) -> None:
    """There and back: a connection, from the uplink's address."""
    guest = net.guest(1, **asked)
    server = net.tcp_server(target, 7000, net.internet)
    assert network_world.connects(guest.space, target, 7000)
    wire, peer = server.accept()
    wire.close()
    assert peer[0] == UPLINK


def test_the_host_reaches_guests_and_guests_the_bridges_name_service(net: Net) -> None:
    guest = net.guest(1)
    net.tcp_server(guest.address, 22, guest.space)
    socket.create_connection((guest.address, 22), timeout=network_world.DEADLINE_S).close()
    send, arrived = packets.udp(net, guest, BRIDGE, 53, at=None)
    assert network_world.fate(net, send, arrived) == "arrived"


def test_peers_of_one_network_reach_each_other_alone(net: Net) -> None:
    one, two = net.guest(1, peers="shop"), net.guest(2, peers="shop")
    other, alone = net.guest(3, peers="bank"), net.guest(4)
    server = net.tcp_server(two.address, 80, two.space)
    assert network_world.connects(one.space, two.address, 80)
    for stranger in (other, alone):
        before = net.drops()["guest_to_guest"]
        assert not network_world.connects(stranger.space, two.address, 80, timeout_s=0.5)
        network_world.until(
            lambda before=before: net.drops()["guest_to_guest"] > before,  # type: ignore[misc]
            "what it asked was not counted",
        )
    server.close()


def test_another_network_is_ruled_like_the_default_one(
    helper_world_here: helper_world.HelperWorld, own_network: None
) -> None:
    policy = msgspec.structs.replace(
        helper_world_here.policy, network="172.29.64.0/19", network6="fd98:7:6:5::/64"
    )
    with network_world.networks(dataclasses.replace(helper_world_here, policy=policy)) as net:
        one, two = net.guest(1, nat=True, ipv6=True, peers="shop"), net.guest(2, ipv6=True, peers="shop")
        assert (one.address, one.address6) == ("172.29.64.2", "fd98:7:6:5::2")
        for address, space in (
            (INTERNET, net.internet),
            (network_world.INTERNET6, net.internet),
            (two.address, two.space),
            (two.address6, two.space),
            ("172.29.64.1", None),
        ):
            net.tcp_server(address, names.DNS_PORT, space)
            assert network_world.connects(one.space, address, names.DNS_PORT), address
        assert network_world.connects(one.space, "172.29.64.1", 53)
        outside = packets.udp(net, two, INTERNET, at=net.internet)
        host = packets.udp(net, two, "172.29.64.1", at=None)
        of_default = packets.datagram("10.213.240.3", "172.29.64.1", b"spoofed")
        head = packets.BRIDGE_MAC + packets.packed(two.mac) + b"\x08\x00"
        spoofed = packets.frame(net, two, head + of_default), packets.sniffed(net, "br-fc", b"spoofed")
        fates = [network_world.fate(net, *each) for each in (outside, host, spoofed)]
        assert fates == ["no_nat", "host_service", "spoofed"]


def test_isolated_ports_keep_guests_apart_even_without_rules(net: Net) -> None:
    one, two = net.guest(1), net.guest(2)
    for family in ("bridge", "inet"):
        network_world.run("nft", "delete", "table", family, "banger")
    data = packets.datagram(one.address, two.address, b"neighbour")
    head = packets.packed(two.mac) + packets.packed(one.mac) + b"\x08\x00"
    seen = packets.sniffed(net, "eth0", b"neighbour", two.space)
    host = packets.sniffed(net, "br-fc", b"marker")
    send, marker = (
        packets.frame(net, one, head + data),
        packets.frame(
            net, one, packets.BRIDGE_MAC + head[6:] + packets.datagram(one.address, BRIDGE, b"marker")
        ),
    )
    send()
    marker()  # frames stay in order: when this one has passed, so would have the first
    network_world.until(host, "the marker was lost")
    assert not seen()
    network_world.run("ip", "link", "set", one.tap, "type", "bridge_slave", "isolated", "off")
    send()
    network_world.until(seen, "an open port did not pass it")


@pytest.mark.parametrize("last", [0x00, 0x01, 0x02, 0x0E])
def test_the_bridge_learns_from_no_frame_that_rules_do_not_see(net: Net, last: int) -> None:
    """What is for another guest goes to whom the bridge last saw with that address."""
    one, two = net.guest(1), net.guest(2)

    def drawn_in() -> bool:
        return f"{two.mac} dev {one.tap}" in network_world.run("bridge", "fdb", "show", "br", "br-fc")

    target = packets.FOR_BRIDGES[:5] + bytes([last])
    send = packets.frame(net, one, target + packets.packed(two.mac) + b"\x88\xcc" + bytes(50))
    head = packets.BRIDGE_MAC + packets.packed(one.mac) + b"\x08\x00"
    marker = packets.frame(net, one, head + packets.datagram(one.address, BRIDGE, b"marker"))
    seen = packets.sniffed(net, "br-fc", b"marker")
    send()
    marker()  # frames stay in order
    network_world.until(seen, "the marker was lost")
    assert not drawn_in()
    if last >= 2:  # the first two are a bridge's own business: dropped by rule, and by the kernel
        network_world.run("ip", "link", "set", "br-fc", "type", "bridge", "no_linklocal_learn", "0")
        send()
        network_world.until(drawn_in, "the bridge learnt nothing")


def test_a_tap_without_rules_passes_nothing(net: Net) -> None:
    guest = net.guest(1)
    send, arrived = packets.udp(net, guest, BRIDGE, 53, at=None)
    assert network_world.fate(net, send, arrived) == "arrived"
    net.ask(privileged.DeleteGuestRules(vm_id=guest.vm_id))
    assert network_world.fate(net, send, arrived) == "spoofed"


def test_switching_nat_off_cuts_connections_that_stand(net: Net) -> None:
    guest = net.guest(1, nat=True)
    send, arrived = packets.udp(net, guest, INTERNET, at=net.internet)
    assert network_world.fate(net, send, arrived) == "arrived"
    other = net.guest(2, nat=True)
    net.rules(guest, nat=False)
    assert network_world.fate(net, send, arrived) == "no_nat"
    net.rules(guest, nat=True)
    assert network_world.fate(net, send, arrived) == "arrived"
    net.rules(other, nat=False)


def test_a_resolved_name_is_reached_for_its_time(net: Net) -> None:
    guest = net.guest(1, nat=True, egress="none")
    send, arrived = packets.udp(net, guest, INTERNET, at=net.internet)
    assert network_world.fate(net, send, arrived) == "egress_policy"
    net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=(INTERNET,), ttl_s=3600))
    assert network_world.fate(net, send, arrived) == "arrived"
    net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=(INTERNET,), ttl_s=1))
    network_world.until(lambda: network_world.fate(net, send, arrived) == "egress_policy", "it never ended")
    net.ask(privileged.AllowAddresses(vm_id=guest.vm_id, slot=1, addresses=(INTERNET,), port=7000, ttl_s=60))
    assert network_world.fate(net, send, arrived) == "arrived"
