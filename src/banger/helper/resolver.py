# SPDX-License-Identifier: MIT
"""Privileged operations on systemd-resolved: names of VMs are asked of the daemon, on the bridge's link.

The link, the server and the domains follow from the policy alone. `resolvectl` carries the request to
resolved's bus: a client of our own would be more code that runs as root, for a handful of calls.
"""

from __future__ import annotations

import os
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import network, program
from banger.helper import policy as policies

RUNNING: Final = "/run/systemd/resolve/stub-resolv.conf"
"""Made by resolved when it starts, in whatever way the host uses it."""
_DEADLINE_S: Final = 20.0
# What else it could try on this link: the daemon signs nothing, encrypts nothing, and is the only server.
_OFF: Final = ("default-route", "llmnr", "mdns", "dnssec", "dnsovertls")


def route_resolver(policy: policies.Policy, _request: privileged.RouteResolver) -> privileged.Routed:
    if network.find_bridge(policy) is None:
        raise errors.NotFoundError(f"bridge {policy.bridge} does not exist", hint="ensure the bridge first")
    if not os.path.exists(RUNNING):
        return privileged.Routed(problem="systemd-resolved does not run on this host")
    domains = [f"~{domain}" for domain in names.dns_domains(policy.prefix, policy.prefix6)]
    try:
        _resolvectl("dns", policy.bridge, f"{names.DNS_ADDRESS}:{names.DNS_PORT}")
        _resolvectl("domain", policy.bridge, *domains)
        for setting in _OFF:
            _resolvectl(setting, policy.bridge, "no")
    except BaseException:
        _revert(policy)
        raise
    return privileged.Routed()


def unroute_resolver(policy: policies.Policy, _request: privileged.UnrouteResolver) -> privileged.Done:
    """Without the bridge there is nothing to take back: resolved forgets a link that is gone."""
    if network.find_bridge(policy) is not None and os.path.exists(RUNNING):
        _revert(policy)
    return privileged.Done()


def _revert(policy: policies.Policy) -> None:
    _resolvectl("revert", policy.bridge)


def _resolvectl(*arguments: str) -> None:
    ended = program.run_as_root("resolvectl", arguments, deadline_s=_DEADLINE_S)
    if ended.status != 0:
        said = ended.output.decode(errors="replace").strip()
        raise errors.OperationFailedError(f"resolvectl {arguments[0]} failed: {said}")
