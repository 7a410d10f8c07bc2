# SPDX-License-Identifier: MIT
"""The guest kernel's command line. Pure; the helper only checks that it is one printable line."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from banger.contract import names

# Firecracker ends a VM on the keyboard controller's reset (reboot=k). The i8042 and PCI arguments keep the
# kernel from probing hardware that is not there: firecracker-microvm/firecracker, docs/kernel-policy.md.
_COMMON: Final = (
    "console=ttyS0",
    "quiet",
    "reboot=k",
    "panic=1",
    "pci=off",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.dumbkbd",
    # A kernel in FIPS mode tests its ciphers all the same: Linux, crypto/testmgr.c.
    "cryptomgr.notests",
    "root=/dev/vda",
    "rw",
)
_WORK_DISK: Final = "/dev/vdb:/root:ext4"


def ip_argument(
    name: names.VmName, address: ipaddress.IPv4Address, network: ipaddress.IPv4Network, dns: tuple[str, ...]
) -> str:
    """The value of `ip=`: client::gateway:netmask:hostname:device:autoconf[:dns0[:dns1]].

    Source: Linux, Documentation/admin-guide/nfs/nfsroot.rst.
    """
    gateway = names.bridge_address(network)
    fields = [str(address), "", str(gateway), str(network.netmask), name, "eth0", "off", *dns[:2]]
    return ":".join(fields)


def compose(*, has_initrd: bool, ip: str, guest: Sequence[str] = ()) -> str:
    """Direct boot gets `ip=`; with an initrd the network driver is a module, and `ip=` would stall.

    `guest` are words for our own init, which takes the address from one of them when the kernel cannot.
    """
    if not ip:
        address: tuple[str, ...] = ()
    elif has_initrd:
        address = (f"banger.ip={ip}",)
    else:
        address = (f"ip={ip}",)
    return " ".join((*_COMMON, *address, *guest, f"init={names.GUEST_BINARY}"))


def ip6_argument(slot: int, network: ipaddress.IPv6Network) -> str:
    """The value of our own `banger.ip6=`: the kernel's command line has no word for it."""
    address = names.guest_address6(network, slot)
    return f"{address}/{network.prefixlen},{names.bridge_address6(network)}"


def guest_words(
    name: names.VmName, dns: Sequence[str], *, work_disk: bool, ip6: str = ""
) -> tuple[str, ...]:
    """What the guest's init is told beyond its IPv4 address: guest/README.md, Configuration."""
    mount = (f"banger.mount={_WORK_DISK}",) if work_disk else ()
    six = (f"banger.ip6={ip6}",) if ip6 else ()
    return (f"banger.hostname={name}", *six, *(f"banger.dns={address}" for address in dns), *mount)
