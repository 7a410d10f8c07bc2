# SPDX-License-Identifier: MIT
"""What a VM is made from: its image and its kernel, looked at before a start."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from banger.contract import errors
from banger.vm import host, record

_MIB: Final = 1 << 20
_ROOM_MIB: Final = 64


@dataclass(frozen=True, slots=True)
class Files:
    """What the start must know of image and kernel."""

    guest_sha256: str = ""
    has_initrd: bool = False


def look(layout: host.Layout, vm: record.VmRecord) -> Files:
    """Raises, naming the file and the remedy, when image or kernel are not whole."""
    rootfs = layout.rootfs(vm.image_id)
    if not rootfs.is_file():
        raise errors.NotFoundError(
            f"image {vm.image_id} of {vm.name} has no root file system at {rootfs}",
            hint="build or register the image again: `banger image build --help`",
        )
    about = _about(layout.image_dir(vm.image_id) / "image.json")
    wanted, found = about.get("size_bytes"), rootfs.stat().st_size
    if isinstance(wanted, int) and wanted != found:
        raise errors.OperationFailedError(
            f"image {vm.image_id} of {vm.name} is damaged: {rootfs} has {found} bytes, not {wanted}",
            hint="put the whole file back, or delete the image with its VMs and make it again",
        )
    kernel = layout.kernel_dir(vm.kernel_id) / "vmlinux"
    if not kernel.is_file():
        raise errors.NotFoundError(
            f"kernel {vm.kernel_id} of {vm.name} has no file at {kernel}",
            hint="import the kernel again, or choose another: `banger kernel list`",
        )
    _check_kernel(_about(layout.kernel_dir(vm.kernel_id) / "kernel.json"), vm)
    guest_sha256 = about.get("guest_sha256")
    return Files(
        guest_sha256=guest_sha256 if isinstance(guest_sha256, str) else "",
        has_initrd=(layout.kernel_dir(vm.kernel_id) / "initrd").is_file(),
    )


def _check_kernel(about: dict[str, object], vm: record.VmRecord) -> None:
    """What its import found out, against this host and this VM: nobody waits for a boot that cannot be."""
    name, arch, lacks = about.get("name", vm.kernel_id), about.get("arch"), about.get("lacks")
    if arch is not None and arch != platform.machine():
        raise errors.BadRequestError(
            f"kernel {name} of {vm.name} is for {arch}, and this host is {platform.machine()}",
            hint=f"choose another: `banger vm set {vm.name} --kernel NAME`",
        )
    end, initrd = about.get("loaded_end"), about.get("initrd_bytes")
    needed = (end if isinstance(end, int) else 0) + (initrd if isinstance(initrd, int) else 0)
    if needed > vm.memory_mib * _MIB:
        raise errors.BadRequestError(
            f"kernel {name} needs more than {needed // _MIB} MiB, and {vm.name} has {vm.memory_mib} MiB",
            hint=f"give it more: `banger vm set {vm.name} --memory {-(-needed // _MIB) + _ROOM_MIB}M`",
        )
    if vm.network and isinstance(lacks, list) and "network" in lacks:
        raise errors.BadRequestError(
            f"kernel {name} has no driver for the network that {vm.name} is to have",
            hint="choose another kernel, or make the VM without a network",
        )


def _about(path: Path) -> dict[str, object]:
    """What image or kernel says of itself; nothing when it does not (its guest binary is then patched)."""
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
