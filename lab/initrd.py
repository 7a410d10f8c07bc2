# SPDX-License-Identifier: MIT
"""The lab's initrd: busybox, a short init and the few modules that the root disk needs. Used by image."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

BOOT_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng")
KVM_MODULES = ("kvm_amd", "kvm_intel")


def build(root: Path, init: bytes) -> bytes:
    """Make an initrd from the tree of a host image; `kvm_*` itself is left for init to choose."""
    modules = _modules_directory(root)
    depends = _dependencies(modules)
    loaded = _load_order(depends, BOOT_MODULES)
    kvm = _load_order(depends, KVM_MODULES)
    prepared = [name for name in kvm if _stem(name) not in KVM_MODULES]
    archive = _Archive()
    for directory in ("bin", "dev", "proc", "sys", "root", "kvm", "modules.d"):
        archive.add(directory, stat.S_IFDIR | 0o755)
    archive.add("init", stat.S_IFREG | 0o755, init)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes())
    names = list(dict.fromkeys(loaded + prepared))
    for name in names:
        archive.add(f"modules.d/{Path(name).name}", stat.S_IFREG | 0o644, (modules / name).read_bytes())
    for name in (name for name in kvm if _stem(name) in KVM_MODULES):
        archive.add(f"kvm/{_stem(name)}.ko", stat.S_IFREG | 0o644, (modules / name).read_bytes())
    listing = "".join(f"/modules.d/{Path(name).name}\n" for name in names)
    archive.add("modules", stat.S_IFREG | 0o644, listing.encode())
    return archive.finish()


class _Archive:
    """A cpio archive in the "newc" format, all that the kernel reads."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._pad()
        self._data += content
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def _modules_directory(root: Path) -> Path:
    (version,) = (root / "lib/modules").iterdir()
    return version


def _dependencies(modules: Path) -> dict[str, list[str]]:
    lines = (modules / "modules.dep").read_text().splitlines()
    return {name: needs.split() for name, _, needs in (line.partition(":") for line in lines)}


def _stem(name: str) -> str:
    """Give a module's name as the kernel knows it, which has no hyphens."""
    return Path(name).name.partition(".")[0].replace("-", "_")


def _load_order(depends: dict[str, list[str]], wanted: tuple[str, ...]) -> list[str]:
    """List the wanted modules and what they need, each after all it needs."""
    by_stem = {_stem(name): name for name in depends}
    order: dict[str, None] = {}

    def visit(name: str) -> Iterator[str]:
        for need in depends[name]:
            yield from visit(need)
        yield name

    for stem in wanted:
        order.update(dict.fromkeys(visit(by_stem[stem])))
    return list(order)
