# SPDX-License-Identifier: MIT
"""Privileged operations on packet rules: what one guest may send and reach, as elements of fixed sets."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator
from typing import Any, Final, cast

from banger.contract import egress, errors, names, privileged
from banger.helper import filesystem, forwarding, ruleset
from banger.helper import policy as policies

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
_DONE: Final = privileged.Done()


def set_guest_rules(policy: policies.Policy, request: privileged.SetGuestRules) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    address = str(names.guest_address(policy.prefix, request.slot))
    wanted = [*_link(vm_id, address, request.peers)]
    if request.nat:
        wanted += _egress(address, request, 4)
    if request.ipv6:
        address6 = names.guest_address6(policy.prefix6, request.slot)
        wanted += _link6(vm_id, address6)
        if request.nat:
            wanted += _egress(str(address6), request, 6)
    addresses = {address, str(names.guest_address6(policy.prefix6, request.slot))}
    with ruleset.lock:
        mine = [each._replace(owner=vm_id) for each in wanted]
        forwarding.follow(policy, ruleset.replace(vm_id, mine, addresses=addresses))
    return _DONE


def delete_guest_rules(policy: policies.Policy, request: privileged.DeleteGuestRules) -> privileged.Done:
    with ruleset.lock:
        forwarding.follow(policy, ruleset.replace(request.vm_id, ()))
    return _DONE


def allow_addresses(policy: policies.Policy, request: privileged.AllowAddresses) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    guests: dict[int, IpAddress] = {
        4: names.guest_address(policy.prefix, request.slot),
        6: names.guest_address6(policy.prefix6, request.slot),
    }
    found = {_public(text) for text in request.addresses}
    for version in {address.version for address in found}:
        has_nat = ruleset.Element(ruleset.REACH[version].nat, ruleset.key(str(guests[version])), owner=vm_id)
        if has_nat not in ruleset.elements():
            raise errors.ConflictError(f"VM {vm_id} has no NAT for IPv{version}", vm=vm_id)
    port = (request.port,) if request.port else ()
    wanted: list[ruleset.Element] = []
    for address in sorted(found, key=str):
        reach = ruleset.REACH[address.version]
        key = ruleset.key(str(guests[address.version]), str(address), *port)
        of = reach.named_ports if port else reach.named
        wanted.append(ruleset.Element(of, key, owner=vm_id, timeout_s=request.ttl_s))
    ruleset.refresh(vm_id, wanted)
    return _DONE


def owners() -> set[str]:
    """The ids of all VMs that packet rules speak of, with what was only allowed for a time."""
    return {each.owner for each in ruleset.elements() if each.owner}


def bound(elements: set[ruleset.Element]) -> set[str]:
    """The ids of the VMs whose rules are there: set whole, they begin with a tap's addresses."""
    return {each.owner for each in elements if each.set == ruleset.GUESTS and names.is_id(each.owner)}


def _link(vm_id: names.VmId, address: str, peers: str) -> Iterator[ruleset.Element]:
    tap, mac = names.tap_name(vm_id), names.mac_address(vm_id)
    yield ruleset.Element(ruleset.GUESTS, ruleset.key(tap, mac, address))
    if peers:
        number = _network_number(peers)
        yield ruleset.Element(ruleset.NETWORKS, ruleset.key(tap), number)
        yield ruleset.Element(ruleset.MEMBERS, ruleset.key(number, tap))
        yield ruleset.Element(ruleset.MEMBER_MACS, ruleset.key(mac))


def _link6(vm_id: names.VmId, address: ipaddress.IPv6Address) -> Iterator[ruleset.Element]:
    """The address that the guest was given, and its kernel's own on the link, for neighbours alone."""
    tap, mac = names.tap_name(vm_id), names.mac_address(vm_id)
    yield ruleset.Element(ruleset.WITH_IPV6, ruleset.key(tap))
    yield ruleset.Element(ruleset.MACS6, ruleset.key(tap, int(mac.replace(":", ""), 16)))
    for own in (address, names.link_local(vm_id)):
        yield ruleset.Element(ruleset.SOURCES6, ruleset.key(tap, mac, str(own)))
        yield ruleset.Element(ruleset.TARGETS6, ruleset.key(tap, mac, hex(int(own))))


def _network_number(peers: str) -> int:
    """31 bits of the name's hash, never 0, which is what no network is."""
    return int.from_bytes(hashlib.sha256(peers.encode()).digest()[:4], "big") >> 1 | 1


def _egress(guest: str, request: privileged.SetGuestRules, version: int) -> Iterator[ruleset.Element]:
    reach = ruleset.REACH[version]
    yield ruleset.Element(reach.nat, ruleset.key(guest))
    if request.egress is egress.Egress.INTERNET:
        yield ruleset.Element(reach.internet, ruleset.key(guest))
    if request.egress is egress.Egress.ALL:
        yield ruleset.Element(reach.everywhere, ruleset.key(guest))
    allowed = [(rule.port, _network(rule.cidr)) for rule in request.allow]
    for port in sorted({port for port, network in allowed if network.version == version}):
        # The kernel refuses intervals that overlap. All are of one version, whichever.
        networks = [network for at, network in allowed if at == port and network.version == version]
        of, more = (reach.allowed_ports, (port,)) if port else (reach.allowed, ())
        for network in ipaddress.collapse_addresses(cast("list[ipaddress.IPv4Network]", networks)):
            yield ruleset.Element(of, ruleset.key(guest, _as_json(network), *more))


def _as_json(network: IpNetwork) -> Any:
    if network.prefixlen == network.max_prefixlen:
        return str(network.network_address)
    return {"prefix": {"addr": str(network.network_address), "len": network.prefixlen}}


def _network(cidr: str) -> IpNetwork:
    try:
        return ipaddress.ip_network(cidr)
    except ValueError as error:
        raise errors.BadRequestError(f"{cidr!r} is not a network: {error}") from None


def _public(text: str) -> IpAddress:
    """A name may not stand for the host's own network, loopback or the metadata service: DNS rebinding."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise errors.BadRequestError(f"{text!r} is not an address") from None
    if not egress.is_nameable(address):
        raise errors.BadRequestError(f"a name may not stand for {text}")
    return address
