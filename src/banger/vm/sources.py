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
    """Raises NotFoundError, naming the file and the remedy, when image or kernel are not whole."""
    rootfs = layout.rootfs(vm.image_id)
    if not rootfs.is_file():
        raise errors.NotFoundError(
            f"image {vm.image_id} of {vm.name} has no root file system at {rootfs}",
            hint="build or register the image again: `banger image build --help`",
        )
    kernel = layout.kernel_dir(vm.kernel_id) / "vmlinux"
    if not kernel.is_file():
        raise errors.NotFoundError(
            f"kernel {vm.kernel_id} of {vm.name} has no file at {kernel}",
            hint="import the kernel again, or choose another: `banger kernel list`",
        )
    return Files(
        guest_sha256=_guest_sha256(layout, vm),
        has_initrd=(layout.kernel_dir(vm.kernel_id) / "initrd").is_file(),
    )


def _guest_sha256(layout: host.Layout, vm: record.VmRecord) -> str:
    """Of the guest binary that the image carries; empty (so: patch it) when the image does not say."""
    try:
        about = json.loads((layout.image_dir(vm.image_id) / "image.json").read_bytes())
    except (OSError, ValueError):
        return ""
    value = about.get("guest_sha256") if isinstance(about, dict) else None
    return value if isinstance(value, str) else ""
