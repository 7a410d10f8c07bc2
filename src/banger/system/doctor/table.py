# SPDX-License-Identifier: MIT
"""The rows of `banger doctor`, in the order they are shown."""

from __future__ import annotations

from typing import Final

from banger.system import host
from banger.system.doctor import installed, kernel, network, production, programs, services, storage
from banger.system.doctor.report import Check

_VMS: Final = "running VMs"
_TRUST: Final = "root's safety"
_PRODUCTION: Final = "production"
_SOCKETS: Final = "bangerd-root.socket bangerd"

ORDINARY: Final = (
    Check("architecture", _VMS, kernel.architecture),
    Check("kvm", _VMS, kernel.virtualisation),
    Check("linux", _VMS, kernel.version),
    Check("systemd", "the services", kernel.systemd),
    Check("cgroup v2", "limits of VMs", kernel.cgroups),
    Check("loop", "disks", kernel.Feature("loop", "BLK_DEV_LOOP", "loop-control")),
    Check("dm_snapshot", "disks", kernel.Feature("dm_snapshot", "DM_SNAPSHOT")),
    Check("tun", "network", kernel.Feature("tun", "TUN", "tun")),
    Check("bridge", "network", kernel.Feature("bridge", "BRIDGE")),
    Check("nf_tables", "packet rules", kernel.Feature("nf_tables", "NF_TABLES", on_demand=True)),
    Check("nft_ct", "packet rules", kernel.Feature("nft_ct", "NFT_CT", on_demand=True)),
    Check("nft_masq", "NAT", kernel.Feature("nft_masq", "NFT_MASQ", on_demand=True)),
    Check(
        "e2fsprogs",
        "disks",
        programs.Programs("e2fsprogs", ("e2fsck", "debugfs", "mkfs.ext4"), "no VM can start", required=True),
    ),
    Check("libnftables", "packet rules", programs.library),
    Check(
        "mmdebstrap",
        "image build",
        programs.Programs("mmdebstrap", ("mmdebstrap",), "no image can be built"),
    ),
    Check("git", "workspaces", programs.Programs("git", ("git",), "no repository can be taken into a VM")),
    Check("ssh", "vm ssh", programs.Programs("openssh-client", ("ssh", "ssh-keygen"), "no ssh into VMs")),
    Check("installed", "the services", installed.settings),
    Check("uids", _TRUST, installed.uids),
    Check("firecracker", _VMS, installed.RuntimeFile("firecracker")),
    Check("jailer", _VMS, installed.RuntimeFile("jailer")),
    Check("root's code", _TRUST, installed.RootOwned("code")),
    Check("root's interpreter", _TRUST, installed.RootOwned("interpreter")),
    Check("root's programs", _TRUST, installed.RootOwned("programs")),
    Check("root's runtime", _TRUST, installed.RootOwned("runtime")),
    Check("root's settings", _TRUST, installed.RootOwned("settings")),
    Check("root's units", _TRUST, installed.RootOwned("units")),
    Check("commands", _TRUST, installed.commands),
    Check("units as shipped", _TRUST, installed.units),
    Check("units", "the services", services.units),
    Check("bangerd", "the services", services.daemon),
    Check("bangerd-root", "the services", services.helper),
    Check("bangerd socket", _TRUST, services.Socket(str(host.API_SOCKET), _SOCKETS)),
    Check("bangerd-root socket", _TRUST, services.Socket(str(host.HELPER_SOCKET), _SOCKETS)),
    Check("bangerd-build socket", _TRUST, services.Socket(str(host.BUILDER_SOCKET), "bangerd-build.socket")),
    Check("socket directory", _TRUST, installed.Private("/run/banger-root", 0o711, by_owner=False)),
    Check("state", _TRUST, installed.Private(str(host.STATE), 0o700)),
    Check("cache", _TRUST, installed.Private(str(host.CACHE), 0o700)),
    Check("helper state", _TRUST, installed.Private(str(host.HELPER), 0o711, by_owner=False)),
    Check("bangerd exposure", _TRUST, services.Exposure("bangerd.service")),
    Check("bangerd-root exposure", _TRUST, services.Exposure("bangerd-root.service")),
    Check("bangerd-build exposure", _TRUST, services.Exposure("bangerd-build@.service")),
    Check("versions", "the services", services.versions),
    Check("cgroup delegation", "limits of VMs", kernel.delegation),
    Check("network", "network", network.prefix),
    Check("ipv6", "network", network.ipv6),
    Check("dns", "names of VMs", network.vm_names),
    Check("jail mount", _VMS, storage.jail_mount),
    Check("room for VMs", "disks", storage.Room(host.STATE, "disks and images")),
    Check("room for the cache", "images", storage.Room(host.CACHE, "what is pulled and built")),
    Check("room for jails", _VMS, storage.Room(host.HELPER, "jails and logs")),
    Check("configuration", _VMS, storage.configuration),
    Check("image", _VMS, storage.image),
    Check("kernel", _VMS, storage.kernel),
    Check("records", "images", storage.records),
    Check("leftovers", "disks", services.leftovers),
)

PRODUCTION: Final = (
    Check("smt", _PRODUCTION, production.smt),
    Check("ksm", _PRODUCTION, production.ksm),
    Check("swap", _PRODUCTION, production.swap),
    Check("mitigations", _PRODUCTION, production.mitigations),
    Check("nx_huge_pages", _PRODUCTION, production.nx_huge_pages),
    Check("tested kernel", _PRODUCTION, production.kernel_version),
    Check("console", _PRODUCTION, production.console_log),
    Check("ecc memory", _PRODUCTION, production.ecc),
    Check("jailed", _PRODUCTION, production.jailed),
    Check("limits", _PRODUCTION, production.limits),
    Check("disk limits", _PRODUCTION, production.io_limits),
    Check("guests' logs", _PRODUCTION, production.logs),
)
"""What Firecracker recommends for hosts that serve strangers."""
