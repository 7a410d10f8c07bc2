# SPDX-License-Identifier: MIT
"""NAT where other firewalls stand in the path: it works, and their rules are what they were, to the byte."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.contract import errors, names, privileged
from banger.helper import forwarding, guest_rules, network, program, ruleset, spares
from banger.helper.linux import netlink, nftables
from tests.root import firewalls, helper_world, network_world
from tests.root.network_world import BRIDGE, INTERNET, Net

pytestmark = pytest.mark.usefixtures("own_network")
ALL = pytest.mark.parametrize(
    "firewall", firewalls.FIREWALLS, ids=[each.name for each in firewalls.FIREWALLS]
)


@pytest.fixture
def net(helper_world_here: helper_world.HelperWorld, own_network: None) -> Iterator[Net]:
    with network_world.networks(helper_world_here) as made:
        yield made
        spares.drain()


def forwards(link: str) -> bool:
    return Path(f"/proc/sys/net/ipv4/conf/{link}/forwarding").read_text() == "1\n"


@ALL
def test_nat_works_and_leaves_no_trace(net: Net, firewall: firewalls.Firewall) -> None:
    firewall.start()
    before = firewall.shown()
    one, two = (net.guest(slot, peers="shop") for slot in (2, 3))
    net.tcp_server(two.address, 80, two.space)
    assert network_world.connects(one.space, two.address, 80)  # br_netfilter shows it to the firewall
    net.unplug(one)
    net.unplug(two)
    assert firewall.shown() == before
    guest = net.guest(1, nat=True)
    server = net.tcp_server(INTERNET, 80, net.internet)
    assert network_world.connects(guest.space, INTERNET, 80)
    assert "banger" in firewall.shown()
    assert firewall.without_ours() == before
    net.rules(guest, nat=False)
    net.rules(guest, nat=True)
    assert network_world.connects(guest.space, INTERNET, 80)
    net.unplug(guest)
    assert firewall.shown() == before
    server.close()


@ALL
def test_without_our_rule_it_would_not_pass(
    net: Net, firewall: firewalls.Firewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    firewall.start()
    monkeypatch.setattr(forwarding, "_pass_others", lambda policy, need: None)
    guest = net.guest(1, nat=True)
    net.tcp_server(INTERNET, 80, net.internet)
    assert not network_world.connects(guest.space, INTERNET, 80, timeout_s=0.5)


@ALL
def test_guests_reach_the_name_service_past_it(net: Net, firewall: firewalls.Firewall) -> None:
    firewall.start()
    guest = net.guest(1)
    server = net.tcp_server(BRIDGE, names.DNS_PORT)
    assert network_world.connects(guest.space, BRIDGE, 53)
    server.close()
    net.tcp_server(BRIDGE, 22)
    assert not network_world.connects(guest.space, BRIDGE, 22, timeout_s=0.5)
    network_world.until(lambda: _untouched() == 8, "that one was not counted, or others were")


def _untouched() -> int:
    """How many of our counters have counted nothing."""
    return network_world.run("nft", "list", "counters", "table", "inet", "banger").count("packets 0 ")


@ALL
def test_what_a_firewall_forgot_when_loaded_anew_is_mended(net: Net, firewall: firewalls.Firewall) -> None:
    firewall.start()
    before = firewall.shown()
    guest = net.guest(1, nat=True)
    for command in firewall.flush:
        network_world.run(*command)
    firewall.start()
    assert firewall.shown() == before
    net.ask(privileged.EnsureBridge())
    net.tcp_server(INTERNET, 80, net.internet)
    assert network_world.connects(guest.space, INTERNET, 80)
    net.unplug(guest)
    assert firewall.shown() == before


def test_what_another_firewall_refuses_is_closed_again(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rules are locked when ours are half there; the daemon then sets what its row says."""
    firewall = firewalls.FIREWALLS[1]
    firewall.start()
    guest = net.guest(1)
    before, call = firewall.shown(), forwarding._legacy

    def locked(tool: str, verb: str, rule: list[str]) -> program.Ended:
        if (verb, rule[1]) == ("-I", "-o"):
            return program.Ended(4, b"Another app is currently holding the xtables lock")
        return call(tool, verb, rule)

    monkeypatch.setattr(forwarding, "_legacy", locked)
    with pytest.raises(errors.OperationFailedError, match="holding the xtables lock"):
        net.rules(guest, nat=True)
    net.rules(guest, nat=False)
    assert not [each for each in ruleset.elements() if each.set == ruleset.REACH[4].nat]
    assert firewall.shown() == before
    assert not forwards("uplink0")


@pytest.mark.parametrize("firewall", firewalls.FIREWALLS[:2], ids=["nft", "legacy"])
def test_a_last_stop_that_was_cut_off_is_finished_when_tried_again(
    net: Net, firewall: firewalls.Firewall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its elements had gone by then, and no guest is left for whose sake somebody would look."""
    firewall.start()
    before = firewall.shown()
    guest = net.guest(1, nat=True)
    with monkeypatch.context() as patched:
        patched.setattr(forwarding, "sync", helper_killed)
        with pytest.raises(KeyboardInterrupt):
            net.unplug(guest)
    assert not ruleset.elements() - {ruleset.Element(ruleset.OPENED, '"uplink0"')}
    assert forwards("uplink0")
    net.ask(privileged.TearDown(vm_id=guest.vm_id))
    assert firewall.shown() == before
    assert not any(map(forwards, ("br-fc", "uplink0")))


def helper_killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_table_that_only_its_maker_may_change_is_named(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """firewalld 2 does so; its own tool can let the bridge pass."""
    firewall = firewalls.FIREWALLS[4]
    firewall.start()
    monkeypatch.setattr(forwarding, "_has_owner", lambda fields: fields["name"] == "firewalld")
    guest = net.guest(1)
    with pytest.raises(errors.ConflictError, match="inet firewalld") as caught:
        net.rules(guest, nat=True)
    assert "--add-interface=br-fc" in caught.value.hint
    network_world.run(
        "nft", "insert", "rule", "inet", "firewalld", "filter_FORWARD", "iifname", "br-fc", "accept"
    )
    net.rules(guest, nat=True)


def test_tagged_rules_that_are_not_quite_ours_are_replaced_whatever_they_say(net: Net) -> None:
    """One of each kind that nft prints otherwise: a set, no match at all, and one of ours twice."""
    network_world.run("nft", "add", "table", "inet", "other")
    hook = "{ type filter hook forward priority 0; policy drop; }"
    network_world.run("nft", "add", "chain", "inet", "other", "stop", hook)
    for rule in ('iifname { "a", "b" }', "counter", 'iifname "br-fc"', 'iifname "br-fc"'):
        network_world.run("nft", "add", "rule", "inet", "other", "stop", f'{rule} accept comment "banger"')
    guest = net.guest(1, nat=True)
    shown = network_world.run("nft", "list", "chain", "inet", "other", "stop")
    assert re.findall(r'(\w+) "br-fc" counter .* accept comment "banger"', shown) == ["oifname", "iifname"]
    assert shown.count("banger") == 2
    net.unplug(guest)
    assert "banger" not in network_world.run("nft", "list", "chain", "inet", "other", "stop")


def test_forwarding_is_lent_by_the_links_that_need_it_and_given_back(net: Net) -> None:
    network_world.run("ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1")
    assert not any(map(forwards, ("all", "br-fc", "uplink0", "lan0")))
    one, two = net.guest(1), net.guest(2)
    assert not forwards("br-fc")
    net.rules(one, nat=True)
    net.rules(two, nat=True)
    assert [link for link in ("all", "br-fc", "uplink0", "lan0") if forwards(link)] == ["br-fc", "uplink0"]
    net.unplug(one)
    assert forwards("uplink0")
    net.unplug(two)
    assert not any(map(forwards, ("all", "br-fc", "uplink0", "lan0")))
    assert not Path(net.world.policy.helper_dir, "forwarding.json").exists()


def test_a_second_way_out_forwards_too_and_a_private_network_when_asked(net: Net) -> None:
    for link, prefix in (("vpn0", "192.0.2.0/24"), ("lan0", "10.99.0.0/16")):
        network_world.run("ip", "link", "add", link, "type", "veth", "peer", "name", f"{link}x")
        network_world.run("ip", "link", "set", link, "up")
        network_world.run("ip", "link", "set", f"{link}x", "up")
        network_world.run("ip", "route", "add", prefix, "dev", link)
    guest = net.guest(1, nat=True)
    assert [link for link in ("uplink0", "vpn0", "lan0") if forwards(link)] == ["uplink0", "vpn0"]
    net.rules(guest, nat=True, egress="all")
    assert forwards("lan0")
    net.rules(guest, nat=True)
    assert not forwards("lan0")
    net.unplug(guest)
    assert not any(map(forwards, ("uplink0", "vpn0", "lan0")))


def test_a_host_that_forwards_anyway_goes_on(net: Net) -> None:
    network_world.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    guest = net.guest(1, nat=True)
    assert not [each for each in ruleset.elements() if each.set == ruleset.OPENED]
    net.unplug(guest)
    assert forwards("all")
    assert forwards("uplink0")


def test_a_host_that_began_to_forward_meanwhile_goes_on(net: Net) -> None:
    guest = net.guest(1, nat=True)
    network_world.run("sysctl", "-qw", "net.ipv4.ip_forward=1")  # as Docker does when it starts
    net.ask(privileged.EnsureBridge())
    assert not [each for each in ruleset.elements() if each.set == ruleset.OPENED]
    net.unplug(guest)
    assert forwards("uplink0")


def test_links_opened_before_a_reboot_are_not_ours(net: Net) -> None:
    path = Path(net.world.policy.helper_dir, "forwarding.json")
    path.write_text(json.dumps({"boot_id": "another", "links": ["uplink0"]}))
    netlink_link = netlink.find("uplink0")
    assert netlink_link is not None
    netlink.set_forwarding(netlink_link, on=True)
    guest = net.guest(1, nat=True)
    net.unplug(guest)
    assert forwards("uplink0")


def test_flushed_rules_are_rebuilt_and_said_so(net: Net) -> None:
    guest = net.guest(1, nat=True)
    network_world.run("nft", "flush", "ruleset")
    from banger.helper import operations

    found = operations.execute(net.world.policy, privileged.EnsureBridge())
    assert (found.rebuilt, found.with_rules) == (True, ())
    assert not operations.execute(net.world.policy, privileged.EnsureBridge()).rebuilt
    assert not forwards("uplink0")
    net.rules(guest, nat=True)
    net.tcp_server(INTERNET, 80, net.internet)
    assert network_world.connects(guest.space, INTERNET, 80)


def test_deleting_the_bridge_takes_everything(net: Net) -> None:
    firewall = firewalls.FIREWALLS[0]
    firewall.start()
    before = firewall.shown()
    guest = net.guest(1, nat=True)
    net.ask(privileged.DeleteTap(vm_id=guest.vm_id))
    net.ask(privileged.DeleteBridge())
    assert firewall.shown() == before
    assert not forwards("uplink0")
    assert "banger" not in network_world.run("nft", "list", "tables")


def test_a_foreign_table_of_our_name_is_left_alone(net: Net) -> None:
    network_world.run("nft", "delete", "table", "inet", "banger")
    network_world.run("nft", "add", "table", "inet", "banger")
    with pytest.raises(errors.ConflictError, match="inet banger"):
        net.ask(privileged.EnsureBridge())
    net.ask(privileged.DeleteBridge())
    assert "table inet banger" in network_world.run("nft", "list", "tables")


@contextlib.contextmanager
def faults(choose: random.Random, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the kernel is asked fails now and then, before or after it was done."""

    def unreliable(work: Callable[..., object]) -> Callable[..., object]:
        def called(*arguments: object, **more: object) -> object:
            luck = choose.random()
            if luck < 0.03:
                raise OSError(errno.ENOBUFS, "no buffer space")
            done = work(*arguments, **more)
            if luck > 0.97:
                raise OSError(errno.EINTR, "interrupted")
            return done

        return called

    with monkeypatch.context() as patched:
        for module, name in (
            (netlink, "bring_up"),
            (netlink, "add_port"),
            (netlink, "find_number"),
            (netlink, "keep_tap"),
            (netlink, "delete"),
            (nftables, "change"),
            (netlink, "set_forwarding"),
        ):
            patched.setattr(module, name, unreliable(getattr(module, name)))
        yield


@pytest.mark.timeout(240)  # half a minute with a processor of its own
def test_two_hundred_guests_under_faults_leave_nothing_that_is_not_found_again(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step may fail, and is then undone as a start undoes it; what that leaves, the next one mends."""
    firewall = firewalls.FIREWALLS[0]
    firewall.start()
    before = firewall.shown()
    choose = random.Random(11)
    failed, there = 0, set[int]()

    def turn(slot: int) -> None:
        """Makes it, or ends it."""
        nonlocal failed, there
        vm_id = f"{slot:04x}" * 3
        made = slot not in there
        with contextlib.suppress(OSError):
            if choose.random() < 0.5:
                network.refill(net.world.policy)
        steps: list[privileged.AnyRequest] = [
            privileged.SetGuestRules(vm_id=vm_id, slot=slot, nat=True, ipv6=slot % 10 == 0),
            privileged.CreateTap(vm_id=vm_id, slot=slot),
        ]
        try:
            for step in steps if made else [privileged.TearDown(vm_id=vm_id)]:
                net.ask(step)
        except (errors.BangerError, OSError, ExceptionGroup):
            failed += 1
            made = False
            with contextlib.suppress(errors.BangerError, OSError, ExceptionGroup):
                net.ask(privileged.TearDown(vm_id=vm_id))
        there = there | {slot} if made else there - {slot}

    def taps() -> list[str]:
        aliases = [link.alias for link in netlink.links() if link.name.startswith("tap-")]
        return sorted(alias.removeprefix("banger/") for alias in aliases)

    with faults(choose, monkeypatch):
        for slot in choose.sample(range(1, 201), 200):
            while slot not in there:
                turn(slot)
        addressed = [each for each in ruleset.elements() if each.set == ruleset.GUESTS]
        assert sorted(each.owner for each in addressed) == taps() == [f"{n:04x}" * 3 for n in range(1, 201)]
        assert len({each.key for each in addressed}) == 200
        for slot in choose.choices(range(1, 201), k=40):
            turn(slot)
    assert failed > 10
    assert len(set(taps())) == len(taps())
    assert len([link for link in netlink.links() if spares.is_spare(link)]) <= spares.LIMIT
    wanted = {f"{slot:04x}" * 3 for slot in there}
    assert set(taps()) >= wanted
    assert guest_rules.owners() >= wanted
    for vm_id in guest_rules.owners() | set(taps()):
        net.ask(privileged.TearDown(vm_id=vm_id))
    assert not [each for each in ruleset.elements() if each.owner]
    assert not taps()
    assert not any(map(forwards, ("br-fc", "uplink0")))
    assert firewall.shown() == before


def test_guests_in_random_order_leave_exactly_what_is_wanted(net: Net) -> None:
    """Taps and rules, acquired and released, some twice and some halfway, the pool full or not."""
    choose = random.Random(7)
    wanted: dict[int, bool] = {}
    slots = list(range(1, 51))
    for step, slot in enumerate(itertools.chain(slots, choose.choices(slots, k=100))):
        vm_id = f"{slot:04x}" * 3
        if slot in wanted and choose.random() < 0.6:
            net.ask(privileged.TearDown(vm_id=vm_id)) if step % 2 else net.ask(
                privileged.DeleteTap(vm_id=vm_id)
            )
            net.ask(privileged.DeleteGuestRules(vm_id=vm_id))
            net.ask(privileged.DeleteTap(vm_id=vm_id))
            del wanted[slot]
        else:
            nat = choose.random() < 0.5
            if choose.random() < 0.5:
                network.refill(net.world.policy)
            net.ask(privileged.CreateTap(vm_id=vm_id, slot=slot))
            net.ask(privileged.SetGuestRules(vm_id=vm_id, slot=slot, nat=nat))
            wanted[slot] = nat
    owners = [each.owner for each in ruleset.elements() if each.set == ruleset.GUESTS]
    assert sorted(owners) == sorted(f"{slot:04x}" * 3 for slot in wanted)
    natted = [each.owner for each in ruleset.elements() if each.set == ruleset.REACH[4].nat]
    assert sorted(natted) == sorted(f"{slot:04x}" * 3 for slot, nat in wanted.items() if nat)
    taps = [link.name for link in netlink.links() if link.name.startswith("tap-")]
    assert len(taps) == len(wanted)
    for slot in wanted:
        net.ask(privileged.TearDown(vm_id=f"{slot:04x}" * 3))
    assert not [each for each in ruleset.elements() if each.owner]
    assert not [link for link in netlink.links() if link.name.startswith("tap-")]
