# SPDX-License-Identifier: MIT
"""Privileged operations on packet rules: what one guest may send and reach, as elements of fixed sets."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator
from typing import Any, Final

from banger.contract import egress, errors, names, privileged
from banger.helper import filesystem, forwarding, ruleset
from banger.helper import policy as policies

_DONE: Final = privileged.Done()


def set_guest_rules(policy: policies.Policy, request: privileged.SetGuestRules) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    address = str(names.guest_address(policy.prefix, request.slot))
    wanted = [*_link(vm_id, address, request.peers)]
    if request.nat:
        wanted += _egress(address, request)
    with ruleset.lock:
        forwarding.follow(policy, ruleset.replace(vm_id, [each._replace(owner=vm_id) for each in wanted]))
    return _DONE


def delete_guest_rules(policy: policies.Policy, request: privileged.DeleteGuestRules) -> privileged.Done:
    with ruleset.lock:
        forwarding.follow(policy, ruleset.replace(request.vm_id, ()))
    return _DONE


def allow_addresses(policy: policies.Policy, request: privileged.AllowAddresses) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    guest = str(names.guest_address(policy.prefix, request.slot))
    if ruleset.Element(ruleset.NAT, ruleset.key(guest), owner=vm_id) not in ruleset.elements():
        raise errors.ConflictError(f"VM {vm_id} has no NAT", vm=vm_id)
    of = ruleset.NAMED_PORTS if request.port else ruleset.NAMED
    port = (request.port,) if request.port else ()
    found = {_public(text) for text in request.addresses}
    wanted = [
        ruleset.Element(of, ruleset.key(guest, address, *port), owner=vm_id, timeout_s=request.ttl_s)
        for address in sorted(found)
    ]
    ruleset.refresh(wanted)
    return _DONE


def owners() -> set[str]:
    """The ids of all VMs that packet rules speak of."""
    return {each.owner for each in ruleset.elements() if each.owner}


def _link(vm_id: names.VmId, address: str, peers: str) -> Iterator[ruleset.Element]:
    tap, mac = names.tap_name(vm_id), names.mac_address(vm_id)
    yield ruleset.Element(ruleset.GUESTS, ruleset.key(tap, mac, address))
    if peers:
        number = _network_number(peers)
        yield ruleset.Element(ruleset.NETWORKS, ruleset.key(tap), number)
        yield ruleset.Element(ruleset.MEMBERS, ruleset.key(number, tap))
        yield ruleset.Element(ruleset.MEMBER_MACS, ruleset.key(mac))


def _network_number(peers: str) -> int:
    """31 bits of the name's hash, never 0, which is what no network is."""
    return int.from_bytes(hashlib.sha256(peers.encode()).digest()[:4], "big") >> 1 | 1


def _egress(guest: str, request: privileged.SetGuestRules) -> Iterator[ruleset.Element]:
    yield ruleset.Element(ruleset.NAT, ruleset.key(guest))
    if request.egress is egress.Egress.INTERNET:
        yield ruleset.Element(ruleset.INTERNET, ruleset.key(guest))
    if request.egress is egress.Egress.ALL:
        yield ruleset.Element(ruleset.EVERYWHERE, ruleset.key(guest))
    for port in sorted({rule.port for rule in request.allow}):
        # The kernel refuses intervals that overlap.
        networks = [_network(rule.cidr) for rule in request.allow if rule.port == port]
        of, more = (ruleset.ALLOWED_PORTS, (port,)) if port else (ruleset.ALLOWED, ())
        for network in ipaddress.collapse_addresses(networks):
            yield ruleset.Element(of, ruleset.key(guest, _as_json(network), *more))


def _as_json(network: ipaddress.IPv4Network) -> Any:
    if network.prefixlen == network.max_prefixlen:
        return str(network.network_address)
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}


def _network(cidr: str) -> ipaddress.IPv4Network:
    try:
        return ipaddress.IPv4Network(cidr)
    except ValueError as error:
        raise errors.BadRequestError(f"{cidr!r} is not an IPv4 network: {error}") from None


def _public(text: str) -> str:
    """A name may not stand for the host's own network, loopback or the metadata service: DNS rebinding."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise errors.BadRequestError(f"{text!r} is not an IPv4 address") from None
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise errors.BadRequestError(f"a name may not stand for {text}")
    return str(address)
