# SPDX-License-Identifier: MIT
"""Bridge and taps on the real kernel, in a network namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence

import pytest

from banger.contract import errors, names, privileged
from banger.helper import network, operations, ruleset, spares
from banger.helper.linux import netlink, nftables
from tests.root.helper_world import OTHER_VM, VM, HelperWorld

pytestmark = pytest.mark.usefixtures("own_network")
TAP = names.tap_name(names.VmId(VM))


def ask(world: HelperWorld, request: privileged.AnyRequest) -> None:
    operations.run(world.policy, request)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10, capture_output=True)


def add_foreign(name: str) -> None:
    """Neither a bridge nor a tap."""
    ip("link", "add", name, "type", "veth", "peer", "name", "other")


def link_names() -> set[str]:
    return {link.name for link in netlink.links()}


def test_bridge_is_made_once_and_repaired(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    first = netlink.find("br-fc")
    assert first is not None
    assert first.is_up
    wanted = netlink.Address(first.number, "10.213.240.1", 20)
    assert wanted in netlink.addresses()
    ip("link", "set", "br-fc", "down")
    ip("addr", "flush", "dev", "br-fc")
    ask(helper_world_here, privileged.EnsureBridge())
    again = netlink.find("br-fc")
    assert again is not None
    assert again.number == first.number
    assert again.is_up
    assert wanted in netlink.addresses()


def test_bridge_has_no_ipv6_address(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    shown = subprocess.run(["ip", "-6", "addr"], check=True, capture_output=True, text=True, timeout=10)
    assert shown.stdout == ""


@pytest.mark.parametrize("kind", ["veth", "bridge"])
def test_a_foreign_link_of_the_bridges_name_is_left_alone(helper_world_here: HelperWorld, kind: str) -> None:
    if kind == "bridge":
        ip("link", "add", "br-fc", "type", kind)
    else:
        add_foreign("br-fc")
    with pytest.raises(errors.ConflictError, match="br-fc"):
        ask(helper_world_here, privileged.EnsureBridge())
    with pytest.raises(errors.ConflictError, match="br-fc"):
        ask(helper_world_here, privileged.DeleteBridge())
    assert netlink.addresses() == []


def test_a_network_in_use_is_refused(helper_world_here: HelperWorld) -> None:
    add_foreign("lan0")
    ip("addr", "add", "10.213.255.7/16", "dev", "lan0")
    with pytest.raises(errors.ConflictError, match="overlaps"):
        ask(helper_world_here, privileged.EnsureBridge())
    assert "br-fc" not in link_names()
    assert nftables.query("tables") == []


def test_a_network_that_is_routed_elsewhere_is_refused(helper_world_here: HelperWorld) -> None:
    add_foreign("tun9")
    ip("addr", "add", "192.0.2.1/24", "dev", "tun9")
    ip("link", "set", "tun9", "up")
    ip("link", "set", "other", "up")
    ip("route", "add", "10.213.0.0/16", "via", "192.0.2.2")
    with pytest.raises(errors.ConflictError, match="overlaps"):
        ask(helper_world_here, privileged.EnsureBridge())
    ip("route", "del", "10.213.0.0/16")
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.EnsureBridge())


def test_bridge_with_taps_is_not_deleted(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    with pytest.raises(errors.ConflictError, match=TAP):
        ask(helper_world_here, privileged.DeleteBridge())
    ask(helper_world_here, privileged.DeleteTap(vm_id=VM))
    ask(helper_world_here, privileged.DeleteBridge())
    ask(helper_world_here, privileged.DeleteBridge())
    assert link_names() == {"lo"}


def test_where_packet_rules_cannot_be_loaded_there_is_no_bridge_to_make_taps_on(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was taken over would go on after the error: its guest's packets would meet no rule."""

    def fail(_: str) -> None:
        raise nftables.RefusedError("nftables refused a change: no such file or directory")

    monkeypatch.setattr(nftables, "load", fail)
    with pytest.raises(nftables.RefusedError):
        ask(helper_world_here, privileged.EnsureBridge())
    with pytest.raises(errors.NotFoundError, match="br-fc"):
        ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    assert link_names() == {"lo"}


def test_rules_come_back_also_while_another_link_has_the_network(helper_world_here: HelperWorld) -> None:
    """As a VPN may that came up meanwhile: guests that run must not be without rules for as long."""
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    add_foreign("vpn0")
    ip("addr", "add", "10.213.255.7/16", "dev", "vpn0")
    subprocess.run(["nft", "flush", "ruleset"], check=True, timeout=10)
    with pytest.raises(errors.ConflictError, match="overlaps"):
        ask(helper_world_here, privileged.EnsureBridge())
    assert len(nftables.query("tables")) == 2


def test_no_tap_is_made_while_the_bridge_and_its_rules_go(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be up and without rules, and its guest could send the host whatever it liked."""
    ask(helper_world_here, privileged.EnsureBridge())
    drain, came_to = spares.drain, list[Exception | None]()

    def attempt() -> None:
        try:
            ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
        except errors.NotFoundError as error:
            came_to.append(error)
        else:
            came_to.append(None)

    other = threading.Thread(target=attempt)

    def meanwhile() -> None:
        """Ports were looked for, and the bridge is still there."""
        other.start()
        other.join(timeout=1)
        drain()

    monkeypatch.setattr(spares, "drain", meanwhile)
    ask(helper_world_here, privileged.DeleteBridge())
    other.join(timeout=10)
    assert isinstance(came_to[0], errors.NotFoundError)
    assert link_names() == {"lo"}


def test_a_deletion_of_the_bridge_that_was_cut_off_is_finished_by_the_next(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(5, "broken", "rules")

    ask(helper_world_here, privileged.EnsureBridge())
    with monkeypatch.context() as cut_off:
        cut_off.setattr(ruleset, "delete", fail)
        with pytest.raises(errors.OperationFailedError):
            ask(helper_world_here, privileged.DeleteBridge())
    assert link_names() == {"lo"}
    ask(helper_world_here, privileged.DeleteBridge())
    assert nftables.query("tables") == []


def test_rules_stay_as_long_as_a_vm_has_a_tap_wherever_the_bridge_is(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    ip("link", "delete", "br-fc")
    with pytest.raises(errors.ConflictError, match=TAP):
        ask(helper_world_here, privileged.DeleteBridge())
    assert len(nftables.query("tables")) == 2


def test_a_host_without_nftables_has_nothing_to_delete(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nftables, "_LIBRARY", "libnftables.so.none")
    nftables._library.cache_clear()
    try:
        ask(helper_world_here, privileged.DeleteBridge())
        with pytest.raises(errors.MissingToolError, match="nftables"):
            ask(helper_world_here, privileged.EnsureBridge())
    finally:
        nftables._library.cache_clear()
    assert link_names() == {"lo"}


def test_tap_is_the_vms_isolated_and_persistent(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=5))
    tap = netlink.find(TAP)
    bridge = netlink.find("br-fc")
    assert tap is not None
    assert bridge is not None
    assert tap.tun_owner == helper_world_here.policy.uid(5)
    assert tap.master == bridge.number
    assert tap.is_up
    shown = subprocess.run(
        ["bridge", "-d", "link", "show", "dev", TAP], check=True, capture_output=True, text=True, timeout=10
    )
    assert "isolated on" in shown.stdout
    detail = subprocess.run(
        ["ip", "-d", "link", "show", TAP], check=True, capture_output=True, text=True, timeout=10
    ).stdout
    assert "vnet_hdr on persist on" in detail
    assert network.tap_owners(helper_world_here.policy, netlink.links()) == [VM]


def test_only_the_vms_uid_may_open_its_tap(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=5))
    uid = helper_world_here.policy.uid(5)
    program = (
        "import fcntl,os,struct,sys\n"
        "fd=os.open('/dev/net/tun',os.O_RDWR)\n"
        f"fcntl.ioctl(fd,0x400454CA,struct.pack('16sH22x',{TAP.encode()!r},0x5002))\n"
    )
    # /dev/net/tun may be closed to others on this machine; a jail has a node of its own.
    mode = os.stat("/dev/net/tun").st_mode & 0o777
    os.chmod("/dev/net/tun", 0o666)  # noqa: S103 - put back below
    try:
        for who, good in ((uid, True), (uid + 1, False)):
            tried = subprocess.run(
                ["/usr/bin/python3", "-c", program],
                user=who,
                group=who,
                extra_groups=[],
                capture_output=True,
                timeout=30,
            )
            assert (tried.returncode == 0) is good, tried.stderr
    finally:
        os.chmod("/dev/net/tun", mode)


def test_tap_is_made_anew_when_it_is_ours(helper_world_here: HelperWorld) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=5))
    ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=6))
    tap = netlink.find(TAP)
    assert tap is not None
    assert tap.tun_owner == helper_world_here.policy.uid(6)


@pytest.mark.parametrize("foreign", ["veth", "tap of root", "tap of another VM"])
def test_a_foreign_link_of_the_taps_name_is_left_alone(helper_world_here: HelperWorld, foreign: str) -> None:
    ask(helper_world_here, privileged.EnsureBridge())
    if foreign == "veth":
        add_foreign(TAP)
    else:
        owner = 0 if foreign == "tap of root" else helper_world_here.policy.uid(9)
        ip("tuntap", "add", TAP, "mode", "tap", "user", str(owner))
        ip("link", "set", TAP, "alias", f"banger/{OTHER_VM if owner else VM}")
    before = netlink.find(TAP)
    with pytest.raises(errors.ConflictError, match=TAP):
        ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    ask(helper_world_here, privileged.DeleteTap(vm_id=VM))
    assert netlink.find(TAP) == before


def test_tap_without_bridge_is_refused(helper_world_here: HelperWorld) -> None:
    with pytest.raises(errors.NotFoundError, match="br-fc"):
        ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    assert link_names() == {"lo"}


def test_half_made_tap_goes_with_its_maker(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last act is to make it persistent; here the act before fails, as it would when we are killed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "broken", TAP)

    ask(helper_world_here, privileged.EnsureBridge())
    monkeypatch.setattr(netlink, "bring_up", fail)
    with pytest.raises(errors.OperationFailedError, match=TAP):
        ask(helper_world_here, privileged.CreateTap(vm_id=VM, slot=1))
    assert link_names() == {"lo", "br-fc"}


def test_packet_rules_are_bounded_and_what_frees_some_is_always_done(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that was taken over could have root read ever more of them, for a day."""
    ask(helper_world_here, privileged.EnsureBridge())
    rules = privileged.SetGuestRules(vm_id=VM, slot=1, nat=True)
    ask(helper_world_here, rules)
    monkeypatch.setattr(ruleset, "MAX_ELEMENTS", len(ruleset.elements()) + 2)

    def allow(*addresses: str) -> None:
        allowed = privileged.AllowAddresses(vm_id=VM, slot=1, addresses=addresses, ttl_s=60)
        ask(helper_world_here, allowed)

    allow("192.0.2.1", "192.0.2.2")
    allow("192.0.2.1", "192.0.2.2")
    with pytest.raises(errors.ConflictError, match="too many"):
        allow("192.0.2.3")
    with pytest.raises(errors.ConflictError, match="too many"):
        ask(helper_world_here, privileged.SetGuestRules(vm_id=OTHER_VM, slot=2))
    ask(helper_world_here, rules)
    ask(helper_world_here, privileged.DeleteGuestRules(vm_id=VM))
    ask(helper_world_here, privileged.SetGuestRules(vm_id=OTHER_VM, slot=2))


def test_one_guest_s_names_are_bounded_and_leave_room_for_others(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who answers for a name that is allowed says how many addresses it has, each time anew."""
    ask(helper_world_here, privileged.EnsureBridge())
    for vm_id, slot in ((VM, 1), (OTHER_VM, 2)):
        ask(helper_world_here, privileged.SetGuestRules(vm_id=vm_id, slot=slot, nat=True))
    monkeypatch.setattr(ruleset, "MAX_OF_ONE", 8)

    def allow(vm_id: str, slot: int, *last: int) -> None:
        addresses = tuple(f"192.0.2.{number}" for number in last)
        ask(
            helper_world_here,
            privileged.AllowAddresses(vm_id=vm_id, slot=slot, addresses=addresses, ttl_s=60),
        )

    allow(VM, 1, 1, 2, 3, 4)
    with pytest.raises(errors.ConflictError, match=VM):
        allow(VM, 1, 5, 6, 7, 8)
    allow(VM, 1, 1, 2, 3, 4)
    allow(OTHER_VM, 2, 5, 6, 7, 8)


def test_packet_rules_are_read_by_one_at_a_time(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as may ask at once would take more memory than the helper has."""
    ask(helper_world_here, privileged.EnsureBridge())
    parse, reading, most = ruleset._elements, list[int](), list[int]()

    def slowly(listed: dict[str, list[nftables.Json]]) -> set[ruleset.Element]:
        reading.append(1)
        most.append(len(reading))
        time.sleep(0.02)
        reading.pop()
        return parse(listed)

    monkeypatch.setattr(ruleset, "_elements", slowly)
    crowd = [threading.Thread(target=ruleset.elements) for _ in range(8)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join(timeout=10)
    assert (len(most), max(most)) == (8, 1)


@pytest.mark.parametrize("end", ["rules", "again"])
def test_an_address_whose_time_ends_just_now_is_in_nobody_s_way(
    helper_world_here: HelperWorld, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """It was there when the rules were read, and the kernel has none to delete any more."""
    ask(helper_world_here, privileged.EnsureBridge())
    ask(helper_world_here, privileged.SetGuestRules(vm_id=VM, slot=1, nat=True))
    allow = privileged.AllowAddresses(vm_id=VM, slot=1, addresses=("192.0.2.1",), ttl_s=1)
    ask(helper_world_here, allow)
    change = nftables.change

    def late(commands: Sequence[nftables.Json]) -> None:
        time.sleep(1.1)
        change(commands)

    with monkeypatch.context() as slow:
        slow.setattr(nftables, "change", late)
        ask(helper_world_here, allow if end == "again" else privileged.DeleteGuestRules(vm_id=VM))
    left = {each.set for each in ruleset.elements() if each.owner == VM}
    assert (ruleset.REACH[4].named in left) == (end == "again")
    assert bool(left) == (end == "again")
