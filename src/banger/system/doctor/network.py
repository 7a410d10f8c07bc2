# SPDX-License-Identifier: MIT
"""Probes of the network: the VMs' addresses are nobody else's on this host."""

from __future__ import annotations

import ipaddress

from banger.contract import errors
from banger.net import addresses
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
    try:
        addresses.check(ours, addresses.routes(scene.at("/proc/net/route")))
    except errors.ConflictError as error:
        return report.failed(error.message, f"sudo banger system install; {error.hint}")
    return report.passed(f"{ours} is the VMs' alone")
