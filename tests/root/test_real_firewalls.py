# SPDX-License-Identifier: MIT
"""NAT past ufw and firewalld themselves, IPv4 and IPv6: it works, and what they made is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.contract import names, privileged
from banger.helper import forwarding
from tests.root import helper_world, network_world, real_firewalls
from tests.root.network_world import BRIDGE, INTERNET, INTERNET6, Guest, Net
from tests.root.real_firewalls import shown, without_ours

pytestmark = pytest.mark.usefixtures("own_network")


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        for address in (INTERNET, INTERNET6):
            made.tcp_server(address, 80, made.internet)
        yield made


@pytest.fixture(params=real_firewalls.NAMES)
def firewall(request: pytest.FixtureRequest, net: Net, tmp_path: Path) -> Iterator[real_firewalls.Firewall]:
    with real_firewalls.made(request.param, tmp_path) as found:
        yield found


def reaches_internet(guest: Guest, *, timeout_s: float = network_world.DEADLINE_S) -> tuple[bool, bool]:
    four, six = (
        network_world.connects(guest.space, address, 80, timeout_s) for address in (INTERNET, INTERNET6)
    )
    return four, six


def test_guests_pass_and_its_rules_are_what_they_were(net: Net, firewall: real_firewalls.Firewall) -> None:
    firewall.start()
    before = shown()
    guest = net.guest(1, nat=True, ipv6=True)
    assert reaches_internet(guest) == (True, True)
    assert shown() != before
    assert without_ours(shown()) == before
    net.rules(guest, nat=False, ipv6=True)
    net.rules(guest, nat=True, ipv6=True)
    assert reaches_internet(guest) == (True, True)
    firewall.reload()
    net.ask(privileged.EnsureBridge())
    assert reaches_internet(guest) == (True, True)
    assert without_ours(shown()) == before
    net.unplug(guest)
    assert shown() == before


def test_it_stops_nothing_that_ours_would_not_and_lets_nothing_more_in(
    net: Net, firewall: real_firewalls.Firewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall.start()
    guest = net.guest(1, ipv6=True)
    net.tcp_server(BRIDGE, names.DNS_PORT)
    net.tcp_server(BRIDGE, 22)
    assert network_world.connects(guest.space, BRIDGE, 53)
    assert not network_world.connects(guest.space, BRIDGE, 22, timeout_s=0.5)
    net.unplug(guest)
    monkeypatch.setattr(forwarding, "_pass_others", lambda policy, need: None)
    other = net.guest(2, nat=True, ipv6=True)
    assert reaches_internet(other, timeout_s=0.5) == (False, False)


def test_it_is_stopped_and_started_while_a_guest_has_nat(
    net: Net, firewall: real_firewalls.Firewall
) -> None:
    firewall.start()
    started = shown()
    firewall.stop()
    stopped = shown()
    guest = net.guest(1, nat=True, ipv6=True)
    assert reaches_internet(guest) == (True, True)
    firewall.start()
    net.ask(privileged.EnsureBridge())
    assert reaches_internet(guest) == (True, True)
    assert without_ours(shown()) == started
    firewall.stop()
    net.ask(privileged.EnsureBridge())
    assert reaches_internet(guest) == (True, True)
    net.unplug(guest)
    assert shown() == stopped
