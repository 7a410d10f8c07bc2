# SPDX-License-Identifier: MIT
"""Addresses of the bridge: in networks that the host has nowhere else, and IPv6 ones while a guest has one.

Hosts that want no IPv6 get none from us. There are two: one in the guests' prefix, at which they find the
host, and one of the link's own, without which the kernel cannot ask who has the address of a guest that it
forwards to.
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
_SHORTEST: Final = {4: 1, 6: 16}
"""A route for all prefixes together is none for ours: ours takes precedence."""
_NONE_HERE: Final = (errno.EACCES, errno.EAFNOSUPPORT, errno.EOPNOTSUPP)
"""What the kernel says where IPv6 is switched off, for the link or altogether."""


def refuse_overlap(network: ipaddress.IPv4Network | ipaddress.IPv6Network, link: int, *, hint: str) -> None:
    """Raises ConflictError when another link has an address there, or leads there."""
    family = socket.AF_INET if network.version == 4 else socket.AF_INET6
    there = [f"{each.local}/{each.prefix_length}" for each in netlink.addresses(family) if each.link != link]
    routes = [each for each in netlink.routes(family) if link not in each.links]
    for other in there + [f"{each.destination}/{each.prefix_length}" for each in routes]:
        found = ipaddress.ip_interface(other).network
        if found.prefixlen >= _SHORTEST[network.version] and found.overlaps(network):
            message = f"network {network} overlaps {found}, which this host already uses"
            raise errors.ConflictError(message, hint=hint)


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
    hint = "`banger doctor` names another one, to install with `--network6`"
    refuse_overlap(policy.prefix6, link.number, hint=hint)
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
