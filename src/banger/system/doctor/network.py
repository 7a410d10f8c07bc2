# SPDX-License-Identifier: MIT
"""Probes of the network: the VMs' addresses are theirs alone, names are answered, what IPv6 there is."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from typing import Final

from banger.contract import errors, names
from banger.net import addresses
from banger.system.doctor import report
from banger.system.doctor import scene as scenes

_ANSWER_BIT: Final = 0x80
# One question, of class IN: who is responsible for `vm`.
_QUESTION: Final = b"\0\0" + b"\0\1" + bytes(6) + b"\x02vm\0" + b"\0\6\0\1"


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
        found = addresses.routes(scene.at(addresses.TABLE))
        addresses.check(ours, [*found, *addresses.policy_routes(scene.at(addresses.TABLES))])
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
    try:
        ours = names.parse_network6(scene.settings().network6)
        addresses.check6(ours, addresses.routes6(scene.at(addresses.TABLE6)))
    except (ValueError, errors.ConflictError) as error:
        hint = getattr(error, "hint", "with --network6")
        return report.failed(f"no VM can have --ipv6: {error}", f"sudo banger system install; {hint}")
    if scene.text("/proc/sys/net/ipv6/conf/all/forwarding") == "1":
        return report.passed("forwarded by this host: VMs with --ipv6 and --nat reach the internet by it")
    return report.passed("not forwarded by this host: VMs with --ipv6 reach it and their peers alone by it")


def vm_names(scene: scenes.Scene) -> report.Finding:
    """Somebody answers for `.vm` where bangerd says, and this host's resolver asks there by itself."""
    dns = scene.require_daemon().dns
    if dns is None or not dns.listen:
        return report.passed("names of VMs are off, as the configuration says")
    if not _answers(dns.listen, scene.answer_s):
        return report.failed(
            f"bangerd does not answer for .vm at {dns.listen}", "sudo banger system restart"
        )
    if dns.problem:
        return report.warned(
            f"{dns.listen} answers, but this host does not ask it by itself: {dns.problem}",
            "see docs/dns.md; dns_route = false in config.toml says that it shall not",
        )
    asked = "this host's resolver asks it" if dns.routed else "asked by whoever names it"
    return report.passed(f"{dns.listen} answers for .vm, {asked}")


def _answers(endpoint: str, limit_s: float) -> bool:
    address, _, port = endpoint.rpartition(":")
    number = os.urandom(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        asking.settimeout(limit_s)
        asking.connect((address, int(port)))
        asking.send(number + _QUESTION)
        answer = asking.recv(4096)
        return answer[:2] == number and len(answer) > 12 and bool(answer[2] & _ANSWER_BIT)
    return False
