# SPDX-License-Identifier: MIT
"""From a request to a row: everything resolved and checked, nothing made yet."""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from banger.contract import destinations, errors, names, resources
from banger.contract import egress as egresses
from banger.vm import record

_ADJECTIVES: Final = (
    "amber", "brave", "brisk", "calm", "clear", "clever", "crisp", "deft", "eager", "early",
    "fair", "fleet", "fresh", "gentle", "glad", "golden", "green", "happy", "hardy", "keen",
    "kind", "light", "lively", "lucky", "mellow", "merry", "mild", "neat", "nimble", "noble",
    "plucky", "proud", "quick", "quiet", "rapid", "ready", "sharp", "silver", "smart", "snowy",
    "steady", "sunny", "swift", "tidy", "true", "vivid", "warm", "wise", "witty", "young",
)  # fmt: skip
_NOUNS: Final = (
    "acorn", "badger", "beacon", "birch", "bison", "brook", "cedar", "comet", "coral", "crane",
    "delta", "dune", "eagle", "ember", "falcon", "fern", "finch", "fjord", "forest", "fox",
    "garnet", "glacier", "harbor", "hawk", "heron", "ibex", "island", "juniper", "kestrel", "lagoon",
    "lark", "lynx", "maple", "marten", "meadow", "nebula", "oak", "orchid", "osprey", "otter",
    "pebble", "pine", "quartz", "raven", "reef", "ridge", "river", "robin", "spruce", "willow",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sized:
    """A value and where it came from."""

    value: int
    source: resources.SizeSource


@dataclass(frozen=True, slots=True)
class Access:
    """What the guest reaches."""

    nat: bool = False
    egress: egresses.Egress = egresses.Egress.INTERNET
    allow: tuple[str, ...] = ()
    peers: str = ""
    ipv6: bool = False


def access(body: resources.CreateVm, *, ipv6: bool = False) -> Access:
    """Raises BadRequestError. `ipv6` is for a request that says nothing of it."""
    allow = allowed(body.allow)
    wants_nat, egress = destinations.opened(body.nat, body.egress, allow)
    if not body.network and (wants_nat or body.peer_network or body.ipv6):
        raise errors.BadRequestError(
            "a VM without network has no NAT, no peers and no IPv6",
            hint="leave out --no-network, or the others",
        )
    has_ipv6 = body.network and (ipv6 if body.ipv6 is None else body.ipv6)
    require_ipv6(allow, has_ipv6=has_ipv6)
    return Access(wants_nat, egress, allow, body.peer_network, has_ipv6)


def require_ipv6(allow: tuple[str, ...], *, has_ipv6: bool) -> None:
    """Raises BadRequestError for an IPv6 destination of a guest that could not go there."""
    for rule in destinations.networks(allow):
        if destinations.is_ipv6(rule) and not has_ipv6:
            raise errors.BadRequestError(
                f"a VM without IPv6 does not reach {rule.cidr}", hint="make it with --ipv6"
            )


def require_opened(allow: tuple[str, ...], closed: str) -> None:
    """Raises BadRequestError for a name that no guest could have opened; `closed` says why, if so."""
    for rule in destinations.named(allow) if closed else ():
        raise errors.BadRequestError(
            f"{rule.name} would never be reached: names are opened when a guest asks us, and {closed}",
            hint="allow its addresses instead, or change config.toml: `dns_listen`, `dns_guests`, `dns`",
        )


def allowed(rules: tuple[str, ...]) -> tuple[str, ...]:
    """Checked, each once, in the order given. Raises BadRequestError."""
    if len(rules) > egresses.MAX_RULES:
        raise errors.BadRequestError(f"{len(rules)} destinations are more than {egresses.MAX_RULES}")
    for rule in rules:
        destinations.parse(rule)
    return tuple(dict.fromkeys(rule.strip().lower() for rule in rules))


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a create request comes to once every default has been applied."""

    image_id: names.ImageId
    kernel_id: names.KernelId
    vcpus: Sized
    memory_mib: Sized
    disk_size_mib: Sized
    network: bool
    access: Access = Access()
    publish: tuple[str, ...] = ()
    idle_stop_s: int = 0
    ttl_s: int = 0
    autostart: bool = False


def new_name(taken: Collection[str]) -> names.VmName:
    """An adjective and a noun; with a number once the plain ones are mostly used up."""
    for _ in range(32):
        name = f"{secrets.choice(_ADJECTIVES)}-{secrets.choice(_NOUNS)}"
        if name not in taken:
            return names.VmName(name)
    return names.VmName(f"{name}-{secrets.randbelow(10**6)}")


def draft(
    vm_id: names.VmId, name: names.VmName, slot: int, resolved: Resolved, now: datetime.datetime
) -> record.VmRecord:
    """The row of a VM that is only reserved: no file, no process, no device yet."""
    return record.VmRecord(
        id=vm_id,
        name=name,
        slot=slot,
        image_id=resolved.image_id,
        kernel_id=resolved.kernel_id,
        vcpus=resolved.vcpus.value,
        memory_mib=resolved.memory_mib.value,
        disk_size_mib=resolved.disk_size_mib.value,
        network=resolved.network,
        ipv6=resolved.access.ipv6,
        nat=resolved.access.nat,
        egress=resolved.access.egress,
        allow=resolved.access.allow,
        peers=resolved.access.peers,
        publish=resolved.publish,
        idle_stop_s=resolved.idle_stop_s,
        ttl_s=resolved.ttl_s,
        autostart=resolved.autostart,
        state=resources.VmState.CREATED,
        created_at=now,
        sources={
            "vcpus": resolved.vcpus.source,
            "memory_mib": resolved.memory_mib.source,
            "disk_size_mib": resolved.disk_size_mib.source,
        },
    )
