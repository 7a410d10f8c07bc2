# SPDX-License-Identifier: MIT
"""Probes of the machine and its kernel: architecture, virtualisation, features, cgroups, systemd."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from typing import Final

from banger.contract import names
from banger.system import kvm, runtime
from banger.system.doctor import report
from banger.system.doctor import scene as scenes

OLDEST_KERNEL: Final = (5, 10)
"""Firecracker supports no host kernel that is older."""
CONTROLLERS: Final = ("cpu", "io", "memory", "pids")
_CGROUPS: Final = "/sys/fs/cgroup"
_KNOWN: Final = ("x86_64", "aarch64")


def architecture(scene: scenes.Scene) -> report.Finding:
    machine = scene.viewer.machine
    if machine not in _KNOWN:
        return report.failed(f"{machine} is none of {', '.join(_KNOWN)}", "use another host")
    if not runtime.catalog(machine):
        return report.warned(
            f"{machine}: the catalog has no Firecracker for it",
            "sudo banger system install --firecracker FILE --jailer FILE",
        )
    return report.passed(machine)


def virtualisation(scene: scenes.Scene) -> report.Finding:
    if not scene.at("/dev/kvm").exists():
        return report.failed("/dev/kvm does not exist", "sudo modprobe kvm_amd || sudo modprobe kvm_intel")
    why = kvm.refusal(scene.text("/proc/cpuinfo"), python=scene.viewer.python, limit_s=scene.long_program_s)
    if why:
        return report.failed(
            why, "switch on virtualisation in the firmware, or nested virtualisation where this host is a VM"
        )
    if not kvm.has_instructions():
        return report.warned("a processor was made, and nothing run in it", "run a VM: `banger vm run`")
    return report.passed("instructions ran in a virtual processor")


def version(scene: scenes.Scene) -> report.Finding:
    if kernel_version(scene) < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        return report.failed(
            f"Linux {scene.viewer.kernel}, and Firecracker wants {oldest} or newer", "upgrade the kernel"
        )
    return report.passed(f"Linux {scene.viewer.kernel}")


def kernel_version(scene: scenes.Scene) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", scene.viewer.kernel)[:2])


@dataclass(frozen=True, slots=True)
class Feature:
    """Something of the kernel's that may be a module. `device`: its name in /proc/misc, if it has one.

    `option`: what the kernel's configuration calls it, less CONFIG_. `on_demand`: the kernel loads it by
    itself for whoever uses it.
    """

    module: str
    option: str
    device: str = ""
    on_demand: bool = False

    def __call__(self, scene: scenes.Scene) -> report.Finding:
        if self.device and self.device in _misc_devices(scene):
            return report.passed(f"there: {self.device} in /proc/misc")
        if self.module in _loaded(scene):
            return report.passed(f"the module {self.module} is loaded")
        directory = f"/lib/modules/{scene.viewer.kernel}"
        config = _configuration(scene)
        if (
            self.module in _module_files(scene, f"{directory}/modules.builtin")
            or f"{self.option}=y" in config
        ):
            return report.passed("built in")
        if self.module in _module_files(scene, f"{directory}/modules.dep"):
            if self.on_demand:
                return report.passed("loaded when it is used")
            return report.warned(f"the module {self.module} is not loaded", f"sudo modprobe {self.module}")
        if not config and not scene.at(directory).is_dir():
            raise scenes.UnseenError(
                f"neither {directory} nor the kernel's configuration is here", "look on the host itself"
            )
        return report.failed(
            f"this kernel has no {self.module}",
            f"install a kernel with {self.module} (linux-image-amd64 or linux-image-cloud-amd64 on Debian)",
        )


def _misc_devices(scene: scenes.Scene) -> set[str]:
    return {
        line.split()[-1] for line in (scene.text_or_none("/proc/misc") or "").splitlines() if line.strip()
    }


def _loaded(scene: scenes.Scene) -> set[str]:
    lines = (scene.text_or_none("/proc/modules") or "").splitlines()
    return {line.split()[0] for line in lines if line.strip()}


def _configuration(scene: scenes.Scene) -> set[str]:
    """Lines such as `BRIDGE=y`; empty where the kernel and the distribution publish none."""
    text = scene.text_or_none(f"/boot/config-{scene.viewer.kernel}")
    packed = scene.at("/proc/config.gz")
    if text is None and packed.exists():
        text = gzip.decompress(packed.read_bytes()).decode()
    return {line.removeprefix("CONFIG_") for line in (text or "").splitlines() if line.startswith("CONFIG_")}


def _module_files(scene: scenes.Scene, path: str) -> set[str]:
    """`kernel/drivers/md/dm-snapshot.ko.xz: …` is dm_snapshot."""
    paths = [line.partition(":")[0].strip() for line in (scene.text_or_none(path) or "").splitlines()]
    return {each.rpartition("/")[2].partition(".")[0].replace("-", "_") for each in paths}


def systemd(scene: scenes.Scene) -> report.Finding:
    if not scene.at("/run/systemd/system").is_dir():
        return report.failed("systemd does not run this host", "use a host that systemd runs")
    return report.passed("runs this host")


def cgroups(scene: scenes.Scene) -> report.Finding:
    offered = scene.text_or_none(f"{_CGROUPS}/cgroup.controllers")
    if offered is None:
        return report.failed(
            "cgroup v2 is not mounted at /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    missing = [name for name in CONTROLLERS if name not in offered.split()]
    if missing:
        return report.warned(
            f"no controller {', '.join(missing)}: VMs run with fewer limits",
            "boot without cgroup_disable=, and without cgroup v1 mounts that hold them",
        )
    return report.passed(" ".join(CONTROLLERS))


def delegation(scene: scenes.Scene) -> report.Finding:
    """The VMs' cgroup has the controllers that the host offers."""
    scene.settings()
    path = f"{_CGROUPS}/{names.CGROUP_PARENT}"
    has = scene.text_or_none(f"{path}/cgroup.controllers")
    if has is None:
        return report.failed(f"{path} does not exist", "sudo systemctl start banger-vms.service")
    offered = (scene.text_or_none(f"{_CGROUPS}/cgroup.controllers") or "").split()
    missing = [name for name in CONTROLLERS if name in offered and name not in has.split()]
    if missing:
        return report.failed(
            f"{path} lacks {', '.join(missing)}",
            "sudo systemctl restart banger-vms.service (it ends all VMs)",
        )
    return report.passed(f"{names.CGROUP_PARENT} has {has}")
