# SPDX-License-Identifier: MIT
"""What is known about a kernel, and where it is: `<state>/kernels/<id>/{vmlinux,initrd,kernel.json}`."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

from banger import artefacts

VMLINUX: Final = "vmlinux"
INITRD: Final = "initrd"
RECORD: Final = "kernel.json"

Kind = Literal["direct", "initrd"]


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`direct` mounts the root disk itself; `initrd` needs modules first (`guest_sha256`: of its /init)."""

    id: str
    name: str
    version: str
    arch: str
    kind: Kind
    vmlinux_sha256: str
    vmlinux_bytes: int
    initrd_sha256: str = ""
    initrd_bytes: int = 0
    guest_sha256: str = ""
    modules: tuple[str, ...] = ()
    loaded_end: int = 0
    """The guest address after what is loaded: a VM needs more memory than that."""
    checked_by: str = ""
    """What was asked whether the kernel can boot; empty for one that was never checked."""
    lacks: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    source: str
    created_at: str


class Kernels(artefacts.Artefacts[Kernel]):
    def __init__(self, root: Path) -> None:
        super().__init__(root, "kernel", RECORD, Kernel)

    def vmlinux(self, kernel_id: str) -> Path:
        return self.path(kernel_id) / VMLINUX

    def initrd(self, kernel_id: str) -> Path | None:
        """None for a kernel that boots directly."""
        path = self.path(kernel_id) / INITRD
        return path if path.exists() else None
