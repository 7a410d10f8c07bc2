# SPDX-License-Identifier: MIT
"""Probes of a host that serves strangers: what Firecracker's guide for production hosts asks for.

What nobody can see from here (one tenant for each VM, current microcode, memory that resists Rowhammer) is
named in docs/doctor.md. Rows about VMMs look at those that run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from banger.contract import names, sizes
from banger.system import host
from banger.system.doctor import kernel, report
from banger.system.doctor import scene as scenes

SUPPORTED_KERNELS: Final = ((5, 10), (6, 1))
"""Those that Firecracker's own tests run on."""
LOG_LIMIT_BYTES: Final = 512 << 10
LOG_SLACK_BYTES: Final = 64 << 10
_CGROUPS: Final = "/sys/fs/cgroup"
_VULNERABILITIES: Final = "/sys/devices/system/cpu/vulnerabilities"
_BOOT: Final = "on the kernel's command line"


def smt(scene: scenes.Scene) -> report.Finding:
    active = scene.text_or_none("/sys/devices/system/cpu/smt/active")
    if active == "1":
        return report.warned(
            "two threads share a core, and what one does shows in the other's timing",
            f"nosmt=force {_BOOT}; until then: echo off | sudo tee /sys/devices/system/cpu/smt/control",
        )
    return report.passed("off" if active == "0" else "this kernel knows none")


def ksm(scene: scenes.Scene) -> report.Finding:
    if scene.text_or_none("/sys/kernel/mm/ksm/run") not in (None, "0", "2"):
        return report.warned(
            "equal pages of different VMs are merged, which shows by timing",
            "echo 2 | sudo tee /sys/kernel/mm/ksm/run, and switch off ksmtuned",
        )
    return report.passed("off")


def swap(scene: scenes.Scene) -> report.Finding:
    used = [line.split()[0] for line in (scene.text_or_none("/proc/swaps") or "").splitlines()[1:]]
    on_disk = [path for path in used if not path.startswith("/dev/zram")]
    if on_disk:
        return report.warned(
            f"guests' memory may be written to {', '.join(on_disk)}",
            "sudo swapoff -a and take it out of /etc/fstab, or encrypt it",
        )
    return report.passed("none on a disk")


def mitigations(scene: scenes.Scene) -> report.Finding:
    """Switched off by hand; or the kernel itself calls the host vulnerable."""
    if "mitigations=off" in (scene.text_or_none("/proc/cmdline") or "").split():
        return report.failed(
            "mitigations=off", "take it from the kernel's command line: mitigations=auto,nosmt"
        )
    directory = scene.at(_VULNERABILITIES)
    if not directory.is_dir():
        return report.warned("this kernel says nothing of vulnerabilities", "run a kernel that does")
    open_ones = sorted(
        path.name for path in directory.iterdir() if path.read_text().strip().startswith("Vulnerable")
    )
    if open_ones:
        return report.warned(
            f"vulnerable: {', '.join(open_ones)}", "update kernel and microcode; see `lscpu` for each"
        )
    return report.passed("the kernel calls the host vulnerable to nothing")


def nx_huge_pages(scene: scenes.Scene) -> report.Finding:
    """Needed where iTLB multihit threatens; elsewhere it makes VMs slow to create since Linux 6.1."""
    setting = scene.text_or_none("/sys/module/kvm/parameters/nx_huge_pages")
    if setting is None:
        return report.passed("this KVM has no such setting")
    multihit = scene.text_or_none(f"{_VULNERABILITIES}/itlb_multihit") or ""
    is_threatened = not multihit.startswith("Not affected")
    is_off = setting in ("N", "never", "0")
    if is_threatened and is_off:
        return report.failed(
            f"{setting}, and a guest can stop this host by iTLB multihit", f"kvm.nx_huge_pages=auto {_BOOT}"
        )
    if is_threatened or setting == "never" or kernel.kernel_version(scene) < (6, 1):
        return report.passed(setting)
    if "favordynmods" in _cgroup_options(scene):
        return report.passed(f"{setting}, with favordynmods")
    return report.warned(
        f"{setting}: since Linux 6.1 each new VM waits for a kernel thread that this host does not need",
        f"kvm.nx_huge_pages=never {_BOOT}, or: sudo mount -o remount,favordynmods {_CGROUPS}",
    )


def _cgroup_options(scene: scenes.Scene) -> list[str]:
    for fields in scene.mounts():
        if fields[4] == _CGROUPS:
            return fields[-1].split(",")
    return []


def kernel_version(scene: scenes.Scene) -> report.Finding:
    if kernel.kernel_version(scene) in SUPPORTED_KERNELS:
        return report.passed(f"Linux {scene.viewer.kernel}")
    tested = " and ".join(".".join(map(str, each)) for each in SUPPORTED_KERNELS)
    return report.warned(
        f"Linux {scene.viewer.kernel}: Firecracker is tested on {tested}",
        "run one of these, kept up to date",
    )


def console_log(scene: scenes.Scene) -> report.Finding:
    """A kernel that writes much to a serial line delays whoever makes taps and VMs."""
    serial = [word for word in (scene.text_or_none("/proc/cmdline") or "").split() if _is_serial(word)]
    level = (scene.text_or_none("/proc/sys/kernel/printk") or "4").split()[0]
    if serial and int(level) > 1:
        return report.warned(
            f"{serial[0]} with log level {level}: making a VM waits for the serial line",
            f"quiet loglevel=1 {_BOOT}; until then: sudo dmesg -n 1",
        )
    return report.passed(f"log level {level}{', no serial line' if not serial else ''}")


def _is_serial(word: str) -> bool:
    return word.startswith(("console=ttyS", "console=ttyAMA", "console=hvc"))


def ecc(scene: scenes.Scene) -> report.Finding:
    if any(scene.at("/sys/devices/system/edac/mc").glob("mc[0-9]*")):
        return report.passed("the kernel watches memory with error correction")
    return report.warned(
        "no memory with error correction seen: Rowhammer may flip bits of others",
        "use ECC memory with target row refresh; modprobe its EDAC driver if it is there",
    )


def _vmms(scene: scenes.Scene) -> list[tuple[str, int]]:
    """VM and pid of each VMM that runs: the processes of the VMs' cgroups. UnseenError when none does."""
    parent = scene.at(f"{_CGROUPS}/{names.CGROUP_PARENT}")
    found = [
        (path.name, int(pid))
        for path in sorted(parent.glob("*"))
        if names.is_id(path.name)
        for pid in (path / "cgroup.procs").read_text().split()
        if (scene.text_or_none(f"/proc/{pid}/cmdline") or "")  # KVM's kernel threads have none
    ]
    if not found:
        raise scenes.UnseenError("no VM runs", "start one: `banger vm run -d`")
    return found


def _status(scene: scenes.Scene, pid: int) -> dict[str, str]:
    lines = scene.text(f"/proc/{pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def jailed(scene: scenes.Scene) -> report.Finding:
    """Every VMM has a uid of its own, no Linux capability, a filter of system calls."""
    given = scene.settings()
    seen: dict[int, str] = {}
    for vm_id, pid in _vmms(scene):
        status = _status(scene, pid)
        uids = {int(uid) for uid in status["Uid"].split()}
        uid = min(uids)
        if len(uids) > 1 or not given.uid_base < uid <= given.uid_base + given.uid_count:
            return _escaped(vm_id, f"has uid {status['Uid'].split()[0]}")
        if uid in seen:
            return _escaped(vm_id, f"has the uid of {seen[uid]}")
        if int(status["CapEff"], 16) or int(status["CapPrm"], 16):
            return _escaped(vm_id, f"has Linux capabilities {status['CapPrm']}")
        if status["Seccomp"] != "2" or status["NoNewPrivs"] != "1":
            return _escaped(vm_id, "has no filter of system calls")
        seen[uid] = vm_id
    return report.passed(f"{len(seen)} VMMs, each with its own uid, no Linux capability, seccomp")


def _escaped(vm_id: str, how: str) -> report.Finding:
    return report.failed(
        f"the VMM of {vm_id} {how}", f"banger vm kill {vm_id}; this must not happen: report it"
    )


def limits(scene: scenes.Scene) -> report.Finding:
    """Every VMM's cgroup limits processors, memory and tasks."""
    vms = sorted({vm_id for vm_id, _ in _vmms(scene)})
    for vm_id in vms:
        path = f"{_CGROUPS}/{names.cgroup_path(names.VmId(vm_id))}"
        for file in ("cpu.max", "memory.max", "pids.max"):
            if (scene.text_or_none(f"{path}/{file}") or "max").split()[0] == "max":
                return report.failed(
                    f"{path} has no limit in {file}",
                    f"see the row cgroup delegation; then banger vm restart {vm_id}",
                )
    return report.passed(f"processors, memory and tasks of {sizes.counted(len(vms), 'VM')}")


def io_limits(scene: scenes.Scene) -> report.Finding:
    """banger sets none for a single VM: how much a disk can take is the host's own matter."""
    vms = {vm_id for vm_id, _ in _vmms(scene)}
    places = [host.SLICE, names.CGROUP_PARENT]
    if any(scene.text_or_none(f"{_CGROUPS}/{place}/io.max") for place in places):
        return report.passed("the VMs together are limited")
    if all(scene.text_or_none(f"{_CGROUPS}/{names.cgroup_path(names.VmId(vm))}/io.max") for vm in vms):
        return report.passed("each VM is limited")
    return report.warned(
        "one VM may keep the disks busy for all",
        f"sudo systemctl set-property {host.SLICE} 'IOWriteBandwidthMax=/dev/DISK 200M'",
    )


def logs(scene: scenes.Scene) -> report.Finding:
    """What guests can make the host write is bounded."""
    directory = scene.at(f"{scene.settings().helper_dir}/logs")
    large = [path for path in _files(directory) if path.stat().st_size > LOG_LIMIT_BYTES + LOG_SLACK_BYTES]
    if large:
        return report.failed(
            f"{scene.shown(large[0])} has grown to {large[0].stat().st_size} bytes",
            "restart its VM; this must not happen: report it",
        )
    return report.passed(f"each file at most {LOG_LIMIT_BYTES >> 10} KiB, with one predecessor")


def _files(directory: Path) -> Iterator[Path]:
    """Raises PermissionError for who may not look."""
    if not directory.exists():
        return
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            yield from (
                Path(file.path) for file in os.scandir(entry.path) if file.is_file(follow_symlinks=False)
            )
