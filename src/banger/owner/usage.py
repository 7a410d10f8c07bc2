# SPDX-License-Identifier: MIT
"""What a VM has taken of the host since its VMM started: counters that its owner may read.

Of its cgroup (Documentation/admin-guide/cgroup-v2.rst) and its tap (ABI/testing/sysfs-class-net-statistics).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from banger.contract import errors, names


@dataclass(frozen=True, slots=True)
class Usage:
    """Zero where the kernel counts nothing."""

    cpu_usec: int = 0
    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0


def of(vm_id: names.VmId, sys: Path = Path("/sys")) -> Usage:
    """Zero for a VM that has just ended. Raises UnavailableError where its owner may not read them."""
    cgroup = sys / "fs/cgroup" / names.cgroup_path(vm_id)
    tap = sys / "class/net" / names.tap_name(vm_id) / "statistics"
    cpu = dict(line.split() for line in _read(cgroup / "cpu.stat").splitlines())
    disks = [field.split("=") for field in _read(cgroup / "io.stat").split() if "=" in field]
    return Usage(
        cpu_usec=int(cpu.get("usage_usec", 0)),
        memory_bytes=_count(cgroup / "memory.current"),
        memory_peak_bytes=_count(cgroup / "memory.peak"),
        # What the tap sends, the guest receives.
        rx_bytes=_count(tap / "tx_bytes"),
        tx_bytes=_count(tap / "rx_bytes"),
        read_bytes=sum(int(value) for key, value in disks if key == "rbytes"),
        write_bytes=sum(int(value) for key, value in disks if key == "wbytes"),
    )


def limit_mib(vm_id: names.VmId, sys: Path = Path("/sys")) -> int:
    """The memory that its cgroup may take; 0 where nothing says that."""
    try:
        said = _read(sys / "fs/cgroup" / names.cgroup_path(vm_id) / "memory.max").strip()
    except errors.UnavailableError:
        return 0
    return int(said) >> 20 if said.isdecimal() else 0


def _count(path: Path) -> int:
    return int(_read(path) or 0)


def _read(path: Path) -> str:
    """A cgroup that goes while it is read is ENODEV."""
    try:
        return path.read_text()
    except PermissionError as error:
        raise errors.UnavailableError(
            f"what this VM uses cannot be read: {error.strerror}: {path}",
            hint="an older version started it; after `banger vm restart` it can be read",
        ) from error
    except OSError:
        return ""
