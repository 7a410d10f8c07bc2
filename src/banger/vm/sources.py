# SPDX-License-Identifier: MIT
"""What a VM is made from: its image and its kernel, looked at before a start."""

from __future__ import annotations

import json
from dataclasses import dataclass

from banger.contract import errors
from banger.vm import host, record


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
    about = _about(layout, vm)
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
    guest_sha256 = about.get("guest_sha256")
    return Files(
        guest_sha256=guest_sha256 if isinstance(guest_sha256, str) else "",
        has_initrd=(layout.kernel_dir(vm.kernel_id) / "initrd").is_file(),
    )


def _about(layout: host.Layout, vm: record.VmRecord) -> dict[str, object]:
    """What the image says of itself; nothing when it does not (its guest binary is then patched)."""
    try:
        about = json.loads((layout.image_dir(vm.image_id) / "image.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
