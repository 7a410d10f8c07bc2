# SPDX-License-Identifier: MIT
"""Names and ids: parsed once at the edge, trusted after; every host resource's name comes from the VM's id.

Each process uses this; the helper validates again whatever the daemon sends.
"""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Final, NewType

from banger.contract import errors

VmId = NewType("VmId", str)
VmName = NewType("VmName", str)
ImageId = NewType("ImageId", str)
KernelId = NewType("KernelId", str)

# A `$` alone also matches before a last line feed, and msgspec searches rather than matches in full.
ID_PATTERN: Final = r"^[0-9a-f]{12}$(?!\n)"
PEER_NETWORK_PATTERN: Final = r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$(?!\n)"
"""A VM's name, or nothing."""

BRIDGE: Final = "br-fc"
CGROUP_PARENT: Final = "banger.slice/banger-vms.service"
"""A unit that systemd delegates to the helper: the VMs' cgroups outlive both services in it."""
DM_PREFIX: Final = "fc-rootfs-"
TAP_PREFIX: Final = "tap-"
MAX_SLOTS: Final = 4000
UID_BASE: Final = 2_100_000_000
"""Above what systemd, containers, subuids (to 600,100,000) and sssd (to 2,000,200,000) take; below 2**31."""
BUILD_UIDS: Final = range(UID_BASE - 4096, UID_BASE)
"""Each build is the next one of these, by the number that systemd counts its connection by."""
NETWORK: Final = "10.213.240.0/20"
"""Outside the default ranges of Docker, libvirt, Kubernetes and AWS; holds MAX_SLOTS guests."""
NETWORK6: Final = "fd62:616e:6765:7200::/64"
"""Where an installation names none; `banger system install` names one of the host's own."""
AGENT_PORT: Final = 1023
PULSE_PORT: Final = 1021
DNS_ADDRESS: Final = "127.0.0.1"
DNS_PORT: Final = 42069
"""Where the daemon answers DNS: for the host at DNS_ADDRESS, for guests at the bridge's address."""
DNS_TOP: Final = "vm"
GUEST_DIR: Final = "/.banger"
GUEST_BINARY: Final = "/.banger/guest"

DEFAULT_NETWORK6: Final = ipaddress.IPv6Network(NETWORK6)
_UNIQUE_LOCAL: Final = ipaddress.IPv6Network("fc00::/7")


def new_id() -> str:
    """A fresh id: 12 hex digits. Two share their first 8, which name a tap, with a chance of 2**-32."""
    return os.urandom(6).hex()


def is_id(text: str) -> bool:
    return re.fullmatch(ID_PATTERN, text) is not None


def dm_name(vm_id: VmId) -> str:
    return f"{DM_PREFIX}{vm_id}"


def tap_name(vm_id: VmId) -> str:
    """8 digits of the id: an interface name holds 15 bytes (IFNAMSIZ minus the terminator)."""
    return f"{TAP_PREFIX}{vm_id[:8]}"


def cgroup_path(vm_id: VmId) -> str:
    """Relative to the cgroup v2 mount. Holds the VM's VMM and nothing else of user space."""
    return f"{CGROUP_PARENT}/{vm_id}"


def loop_label(vm_id: VmId, role: str) -> str:
    """What `lo_file_name` of a loop device says (at most 63 bytes): whose it is and what for."""
    return f"banger/{vm_id}/{role}"


def mac_address(vm_id: VmId) -> str:
    """Locally administered, unicast; 40 bits of the id."""
    return "06:" + ":".join(vm_id[i : i + 2] for i in range(0, 10, 2))


def guest_address(network: ipaddress.IPv4Network, slot: int) -> ipaddress.IPv4Address:
    """The bridge holds the first address of the network, slot n the n-th after it."""
    address = network.network_address + 1 + slot
    if not 1 <= slot <= MAX_SLOTS or address not in network or address == network.broadcast_address:
        raise errors.BadRequestError(f"slot {slot} has no address in {network}")
    return address


def reverse_zones(network: ipaddress.IPv4Network) -> tuple[str, ...]:
    """`in-addr.arpa` names that hold the network's addresses; a zone ends at an octet."""
    parts = network.subnets(new_prefix=24) if network.prefixlen < 24 else [network.supernet(new_prefix=24)]
    return tuple(part.network_address.reverse_pointer.partition(".")[2] for part in parts)


def dns_domains(network: ipaddress.IPv4Network, network6: ipaddress.IPv6Network) -> tuple[str, ...]:
    """The domains for which a resolver should ask the daemon."""
    return (DNS_TOP, *reverse_zones(network), reverse_zone6(network6))


def bridge_address(network: ipaddress.IPv4Network) -> ipaddress.IPv4Address:
    return network.network_address + 1


# --- IPv6 ---


def parse_network6(text: str) -> ipaddress.IPv6Network:
    """Raises ValueError unless it is a /64 of the unique local addresses."""
    try:
        found = ipaddress.IPv6Network(text)
    except ValueError as error:
        raise ValueError(f"network6: {text!r} is not an IPv6 network: {error}") from None
    if found.prefixlen != 64 or not found.subnet_of(_UNIQUE_LOCAL):
        raise ValueError(f"network6: {text!r} is not a /64 in {_UNIQUE_LOCAL}")
    return found


def bridge_address6(network: ipaddress.IPv6Network) -> ipaddress.IPv6Address:
    return network.network_address + 1


def guest_address6(network: ipaddress.IPv6Network, slot: int) -> ipaddress.IPv6Address:
    """As with IPv4: slot n is the n-th after the bridge."""
    if not 1 <= slot <= MAX_SLOTS:
        raise errors.BadRequestError(f"slot {slot} has no address in {network}")
    return network.network_address + 1 + slot


def link_local(vm_id: VmId) -> ipaddress.IPv6Address:
    """What a guest's kernel makes of its hardware address (RFC 4291, modified EUI-64)."""
    mac = bytes.fromhex(mac_address(vm_id).replace(":", ""))
    return ipaddress.IPv6Address(
        b"\xfe\x80" + bytes(6) + bytes([mac[0] ^ 2]) + mac[1:3] + b"\xff\xfe" + mac[3:]
    )


def reverse_zone6(network: ipaddress.IPv6Network) -> str:
    """The `ip6.arpa` name that holds the network's addresses: a nibble for each four bits of the prefix."""
    return ".".join(network.network_address.reverse_pointer.split(".")[32 - network.prefixlen // 4 :])
