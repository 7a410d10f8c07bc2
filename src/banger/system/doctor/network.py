# SPDX-License-Identifier: MIT
"""Probes of the network: the VMs' addresses are nobody else's on this host."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from banger.contract import names
from banger.system.doctor import report
from banger.system.doctor import scene as scenes


def prefix(scene: scenes.Scene) -> report.Finding:
    """No route of the host's, but for the bridge's own and the default, leads into the VMs' network."""
    text = scene.settings().network
    try:
        ours = ipaddress.IPv4Network(text)
    except ValueError as error:
        return report.failed(
            f"network {text!r} is none: {error}", "sudo banger system install --network CIDR"
        )
    for link, network in _routes(scene):
        if link != names.BRIDGE and network.prefixlen and network.overlaps(ours):
            return report.failed(
                f"VMs have {ours}, and the host reaches {network} by {link}",
                "sudo banger system install --network CIDR, with another network",
            )
    return report.passed(f"{ours} is the VMs' alone")


def _routes(scene: scenes.Scene) -> Iterator[tuple[str, ipaddress.IPv4Network]]:
    """The kernel's main table: addresses are hexadecimal, the lowest byte first."""
    for line in scene.text("/proc/net/route").splitlines()[1:]:
        fields = line.split()
        address, mask = (int(fields[column], 16).to_bytes(4, "little") for column in (1, 7))
        yield fields[0], ipaddress.IPv4Network((address, str(ipaddress.IPv4Address(mask))), strict=False)
