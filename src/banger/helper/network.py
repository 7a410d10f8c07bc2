# SPDX-License-Identifier: MIT
"""Privileged operations on links: bridge, with its packet rules, and taps. An alias says whose a link is."""

from __future__ import annotations

import os
import threading
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import addresses, filesystem, forwarding, guest_rules, ruleset, spares, tables
from banger.helper import policy as policies
from banger.helper.linux import netlink

BRIDGE_ALIAS: Final = "banger/bridge"
_BRIDGE_MAC: Final = bytes.fromhex(tables.BRIDGE_MAC.replace(":", ""))
_DONE: Final = privileged.Done()
_taps: Final = threading.Lock()
"""None is made while bridge and rules go: it would be up, and its guest met by no rule."""


def ensure_bridge(policy: policies.Policy, _request: privileged.EnsureBridge) -> privileged.Ensured:
    bridge = find_bridge(policy)
    if bridge is None:
        _refuse_overlap(policy, 0)
    with ruleset.lock:
        # First: where they cannot be loaded there is no bridge either, and so no tap; and whatever is wrong
        # with the bridge that there is, guests that run have rules.
        rebuilt, elements = ruleset.ensure(policy)
        _ensure_link(policy, bridge)
        forwarding.sync(policy, elements)
    return privileged.Ensured(rebuilt, tuple(sorted(guest_rules.bound(elements))))


def _ensure_link(policy: policies.Policy, bridge: netlink.Link | None) -> None:
    if bridge is None:
        number = netlink.add_bridge(policy.bridge, alias=BRIDGE_ALIAS, mac=_BRIDGE_MAC)
    else:
        number = bridge.number
        _refuse_overlap(policy, number)
        if not bridge.is_up:
            netlink.bring_up(number, alias=BRIDGE_ALIAS)
    netlink.learn_from_forwarded_frames(number, policy.bridge)
    wanted = str(names.bridge_address(policy.prefix))
    address = netlink.Address(number, wanted, policy.prefix.prefixlen)
    if address not in netlink.addresses():
        netlink.add_address(address, policy.bridge)


def _refuse_overlap(policy: policies.Policy, bridge: int) -> None:
    hint = f"set another network in {policies.DEFAULT_PATH}"
    addresses.refuse_overlap(policy.prefix, bridge, hint=hint)


def delete_bridge(policy: policies.Policy, _request: privileged.DeleteBridge) -> privileged.Done:
    """Also what one that was cut off has left: without a bridge there may be rules."""
    with _taps, ruleset.lock:
        bridge = find_bridge(policy)
        links = netlink.links()
        used = {names.tap_name(names.VmId(vm_id)) for vm_id in tap_owners(policy, links)}
        if bridge is not None:
            used |= {
                each.name for each in links if each.master == bridge.number and not spares.is_spare(each)
            }
        if used:
            raise errors.ConflictError(f"bridge {policy.bridge} still has {', '.join(sorted(used)[:5])}")
        spares.drain()
        try:
            forwarding.sync(policy, set())
            if bridge is not None:
                netlink.delete(bridge.number, policy.bridge)
            ruleset.delete()
        except errors.MissingToolError:
            if bridge is not None:  # else nothing was ever made that would take a tool to go
                raise
    return _DONE


def create_tap(policy: policies.Policy, request: privileged.CreateTap) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    uid = filesystem.claim(policy, vm_id, request.slot)
    with _taps:
        _make_tap(policy, vm_id, uid, peers=request.peers)
    return _DONE


def _make_tap(policy: policies.Policy, vm_id: names.VmId, uid: int, *, peers: bool) -> None:
    name = names.tap_name(vm_id)
    bridge = find_bridge(policy)
    if bridge is None:
        raise errors.NotFoundError(f"bridge {policy.bridge} does not exist", hint="ensure the bridge first")
    old = find_tap(policy, vm_id)
    if old is not None:
        netlink.delete(old.number, name)
    spare = spares.take(bridge) or spares.make(bridge, name)
    try:
        netlink.set_tap_owner(spare.fd, uid, name)
        if peers:
            netlink.set_isolated(spare.number, name, on=False)
        netlink.bring_up(spare.number, alias=_tap_alias(vm_id), name=name)
        netlink.keep_tap(spare.fd, name)  # last: whatever fails or kills us before leaves no tap
    finally:
        os.close(spare.fd)


def refill(policy: policies.Policy) -> None:
    """Makes the taps that the next starts will take; nothing to do without a bridge."""
    bridge = find_bridge(policy)
    if bridge is not None:
        spares.refill(bridge)


def delete_tap(policy: policies.Policy, request: privileged.DeleteTap) -> privileged.Done:
    """A foreign interface of that name is left alone: nothing of the VM's is left then either."""
    vm_id = names.VmId(request.vm_id)
    tap = netlink.find(names.tap_name(vm_id))
    if tap is not None and is_tap_of(policy, tap, vm_id):
        netlink.delete(tap.number, tap.name)
    return _DONE


def find_bridge(policy: policies.Policy) -> netlink.Link | None:
    """Our bridge; raises when something else has its name."""
    bridge = netlink.find(policy.bridge)
    if bridge is not None and (bridge.kind != "bridge" or bridge.alias != BRIDGE_ALIAS):
        hint = f"rename or delete it, or set another bridge in {policies.DEFAULT_PATH}"
        raise errors.ConflictError(f"interface {policy.bridge} exists and is not banger's", hint=hint)
    return bridge


def find_tap(policy: policies.Policy, vm_id: names.VmId) -> netlink.Link | None:
    """The VM's tap; raises when something else has its name."""
    name = names.tap_name(vm_id)
    tap = netlink.find(name)
    if tap is not None and not is_tap_of(policy, tap, vm_id):
        message = f"interface {name} exists and is not the tap of VM {vm_id}"
        raise errors.ConflictError(message, hint="rename or delete it, then start the VM again", vm=vm_id)
    return tap


def is_tap_of(policy: policies.Policy, link: netlink.Link, vm_id: names.VmId) -> bool:
    return link.kind == "tun" and policy.is_vm_uid(link.tun_owner) and link.alias == _tap_alias(vm_id)


def tap_owners(policy: policies.Policy, links: list[netlink.Link]) -> list[str]:
    """The ids of all VMs that have a tap."""
    labels = [link.alias.rpartition("/")[2] for link in links]
    return [
        vm_id
        for vm_id, link in zip(labels, links, strict=True)
        if is_tap_of(policy, link, names.VmId(vm_id))
    ]


def _tap_alias(vm_id: names.VmId) -> str:
    return f"banger/{vm_id}"
