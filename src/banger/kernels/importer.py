# SPDX-License-Identifier: MIT
"""Turns a directory, a package, a vmlinux or a vmlinuz into a kernel that boots.

The file is inspected first; if its drivers are modules, an initrd is built around the guest binary. The
result is published whole. Used by the daemon and by the lab; unprivileged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from pathlib import Path

import msgspec

from banger import artefacts, pinned
from banger.contract import errors, names
from banger.kernels import deb, initrd, inspect, modules, records


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What was found: a kernel image, its modules if it came with any, or a ready-made initrd."""

    image: Path
    module_dir: Path | None = None
    initrd: Path | None = None


def import_path(
    kernels: records.Kernels, path: Path, *, name: str, guest_binary: Path, source: str = ""
) -> records.Kernel:
    """Imports a directory, a .deb, a vmlinux or a vmlinuz under a name."""
    names.parse_artefact_name(name, "a kernel")
    if not path.exists():
        raise errors.NotFoundError(f"there is no file {path}")
    said = source or f"imported from {path}"
    if path.suffix == ".deb":
        with tempfile.TemporaryDirectory(prefix="banger-kernel-") as scratch:
            deb.extract_kernel(path, Path(scratch))
            return publish(
                kernels, find_parts(Path(scratch)), name=name, guest_binary=guest_binary, source=said
            )
    parts = find_parts(path) if path.is_dir() else Parts(path)
    return publish(kernels, parts, name=name, guest_binary=guest_binary, source=said)


def find_parts(directory: Path) -> Parts:
    """Looks where distributions and banger itself put things."""
    images = [
        found
        for pattern in ("vmlinux", "boot/vmlinux-*", "vmlinuz", "bzImage", "boot/vmlinuz-*")
        for found in sorted(directory.glob(pattern))
        if found.is_file()
    ]
    if not images:
        raise errors.BadRequestError(
            f"{directory} holds no kernel", hint="it should have vmlinux, vmlinuz or boot/vmlinuz-VERSION"
        )
    trees = [tree for pattern in ("lib/modules/*", "modules") for tree in sorted(directory.glob(pattern))]
    module_dirs = [tree for tree in trees if (tree / "kernel").is_dir() or (tree / "modules.dep").exists()]
    if len(images) > 1 or len(module_dirs) > 1:
        raise errors.BadRequestError(f"{directory} holds more than one kernel", hint="name one of them")
    ready = directory / "initrd"
    return Parts(images[0], module_dirs[0] if module_dirs else None, ready if ready.is_file() else None)


def publish(
    kernels: records.Kernels, parts: Parts, *, name: str, guest_binary: Path, source: str
) -> records.Kernel:
    """Inspects, builds the initrd if one is needed, and publishes."""
    kernel = inspect.inspect(parts.image.read_bytes())
    before = _earlier_record(parts, kernel)
    kernel_id = names.new_id()
    load = modules.closure(parts.module_dir) if parts.module_dir is not None else []
    with kernels.stage(kernel_id) as staged:
        (staged / records.VMLINUX).write_bytes(kernel.vmlinux)
        guest_sha256 = before.guest_sha256 if before else ""
        if load:
            (staged / records.INITRD).write_bytes(initrd.build(guest_binary, load))
            guest_sha256 = pinned.sha256_of_path(guest_binary)
        elif parts.initrd is not None:
            (staged / records.INITRD).write_bytes(parts.initrd.read_bytes())
        ready = staged / records.INITRD
        return kernels.publish(
            staged,
            records.Kernel(
                id=kernel_id,
                name=name,
                version=kernel.version,
                arch=kernel.machine,
                kind="initrd" if ready.exists() else "direct",
                vmlinux_sha256=hashlib.sha256(kernel.vmlinux).hexdigest(),
                vmlinux_bytes=len(kernel.vmlinux),
                initrd_sha256=pinned.sha256_of_path(ready) if ready.exists() else "",
                initrd_bytes=ready.stat().st_size if ready.exists() else 0,
                guest_sha256=guest_sha256,
                modules=before.modules if before else tuple(module.name for module in load),
                source=before.source if before else source,
                created_at=artefacts.now(),
            ),
        )


def _earlier_record(parts: Parts, kernel: inspect.Kernel) -> records.Kernel | None:
    """What banger said of a directory it published elsewhere, as long as the files are still those."""
    try:
        said = (parts.image.parent / records.RECORD).read_bytes()
        record = msgspec.json.decode(said, type=records.Kernel)
    except (OSError, msgspec.DecodeError):
        return None
    found = pinned.sha256_of_path(parts.initrd) if parts.initrd is not None else ""
    same = hashlib.sha256(kernel.vmlinux).hexdigest() == record.vmlinux_sha256
    return record if same and found == record.initrd_sha256 else None
