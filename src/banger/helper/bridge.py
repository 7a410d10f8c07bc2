# SPDX-License-Identifier: MIT
"""The bridge's IPv6 addresses, there while a guest has one: hosts that want no IPv6 get none from us.

One in the guests' prefix, at which they find the host, and one of the link's own: without it the kernel
cannot ask who has the address of a guest that it forwards to.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

from banger.contract import errors, names
from banger.helper import policy as policies
from banger.helper.linux import netlink

_LINK_LOCAL: Final = "fe80::fc:ff:fe00:1"
_SHORTEST: Final = 16
_NONE_HERE: Final = (errno.EACCES, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
"""What the kernel says where IPv6 is switched off, for the link or altogether."""


def set_addresses6(policy: policies.Policy, *, wanted: bool) -> None:
    """Idempotent. Raises ConflictError when the host cannot, or has the prefix elsewhere."""
    link = netlink.find(policy.bridge)
    if link is None:
        return
    there = netlink.addresses(socket.AF_INET6)
    ours = (
        netlink.Address(link.number, str(names.bridge_address6(policy.prefix6)), policy.prefix6.prefixlen),
        netlink.Address(link.number, _LINK_LOCAL, 64),
    )
    if not wanted:
        for address in set(ours) & set(there):
            netlink.delete_address(address, policy.bridge)
        return
    elsewhere = [each for each in netlink.routes(socket.AF_INET6) if link.number not in each.links]
    _refuse_overlap(policy, [each for each in there if each.link != link.number], elsewhere)
    for address in ours:
        if address not in there:
            _add(policy, address)


def _add(policy: policies.Policy, address: netlink.Address) -> None:
    try:
        netlink.add_address(address, policy.bridge)
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
        raise errors.ConflictError(
            f"IPv6 is switched off on this host: {policy.bridge} takes no such address",
            hint="make the VM without IPv6, or set net.ipv6.conf.all.disable_ipv6 and "
            "net.ipv6.conf.default.disable_ipv6 to 0",
        ) from error


def _refuse_overlap(
    policy: policies.Policy, others: list[netlink.Address], routes: list[netlink.Route]
) -> None:
    """A route for all local prefixes together is none for ours: ours takes precedence, whichever it is."""
    hint = "`banger doctor` names another one, to install with `--network6`"
    for each in others:
        if ipaddress.IPv6Address(each.local) in policy.prefix6:
            raise errors.ConflictError(
                f"network {policy.prefix6} is in use: this host has {each.local}", hint=hint
            )
    for route in routes:
        network = ipaddress.IPv6Network((route.destination, route.prefix_length))
        if route.prefix_length >= _SHORTEST and network.overlaps(policy.prefix6):
            raise errors.ConflictError(
                f"network {policy.prefix6} overlaps {network}, which this host already uses", hint=hint
            )
