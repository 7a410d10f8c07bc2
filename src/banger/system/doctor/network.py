# SPDX-License-Identifier: MIT
"""Probes of the network: the VMs' addresses are nobody else's on this host, and what IPv6 they can have."""

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


def ipv6(scene: scenes.Scene) -> report.Finding:
    """How far VMs with `--ipv6` get by it. Whether the host forwards it is the host's own choice."""
    if scene.text_or_none("/proc/sys/net/ipv6/conf/all/disable_ipv6") != "0":
        return report.warned(
            "switched off on this host: no VM can have --ipv6",
            "sudo sysctl net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0",
        )
    if scene.text("/proc/sys/net/ipv6/conf/all/forwarding") == "1":
        return report.passed("forwarded by this host: VMs with --ipv6 and --nat reach the internet by it")
    return report.passed("not forwarded by this host: VMs with --ipv6 reach it and their peers alone by it")
