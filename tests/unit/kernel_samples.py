# SPDX-License-Identifier: MIT
"""Small things shaped like kernels, modules and packages, for tests that need no real ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import lz4.block

from banger.kernels import elf, payload

VERSION = "6.1.0-9-test"
BANNER = f"Linux version {VERSION} (nobody@nowhere) #1 SMP".encode()
CATALOG_ENTRY = """
[[kernel]]
name = "{name}"
summary = "mine"
arch = "x86_64"

[kernel.source]
kind = "file"
version = "6.1"
sha256 = "{sha256}"
size_bytes = {size}
sources = [{{ kind = "file", path = "{path}" }}]
"""
"""One entry of a host's own kernel catalog; to be filled in with `format`."""
MODULES: Mapping[str, Sequence[str]] = {
    "drivers/virtio/virtio_ring.ko": (),
    "drivers/virtio/virtio.ko": ("virtio_ring",),
    "drivers/virtio/virtio_mmio.ko": ("virtio", "virtio_ring"),
    "drivers/block/virtio_blk.ko": ("virtio_ring", "virtio"),
    "net/core/failover.ko": (),
    "drivers/net/net_failover.ko": ("failover",),
    "drivers/net/virtio_net.ko": ("virtio", "virtio_ring", "net_failover"),
    "net/vmw_vsock/vsock.ko": (),
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko": ("virtio", "vsock"),
}
BUILTIN = "kernel/fs/ext4/ext4.ko\n"
WITHOUT_DRIVERS = b"\0devtmpfs\0 6ACPI: Interpreter enabled\0 serial8250\0"
NAMES = WITHOUT_DRIVERS + (
    b"\0virtio-mmio\0\0virtio_blk\0\0ext4\0\0vmw_vsock_virtio_transport\0\0virtio_net\0\0overlay\0virtio,mmio\0"
)
CONFIG = (
    "64BIT=y ACPI=y OF=y VIRTIO_MMIO=m VIRTIO_BLK=m EXT4_FS=y VIRTIO_VSOCKETS=m DEVTMPFS=y PROC_FS=y SYSFS=y"
    " TMPFS=y UNIX=y BINFMT_ELF=y BLK_DEV_INITRD=y RD_GZIP=y VIRTIO_NET=m SERIAL_8250_CONSOLE=y"
)


def vmlinux(padding: int = 5000, names: bytes = NAMES) -> bytes:
    """An ELF that passes for a kernel; `names` are those that its built-in drivers leave in it."""
    image = BANNER + b"\0" + names + bytes(padding)
    return elf.wrap(image, load_address=0x1000000, entry_address=0x1000010)


def bzimage(packed: bytes, unpacked_bytes: int) -> bytes:
    """A boot sector, one setup sector, and the payload at offset 0x100 of the protected-mode part."""
    payload = packed + struct.pack("<I", unpacked_bytes)
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    setup[510:512] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x020F)
    struct.pack_into("<H", setup, 0x236, 1)
    struct.pack_into("<II", setup, 0x248, 0x100, len(payload))
    return bytes(setup) + bytes(0x100) + payload


def lz4_frame(data: bytes, block_bytes: int = 8 << 20) -> bytes:
    """A legacy frame, as kernels are packed: blocks of 8 MiB behind their lengths."""
    out = bytearray(payload.LZ4_MAGIC)
    for start in range(0, len(data), block_bytes):
        block = lz4.block.compress(data[start : start + block_bytes], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return bytes(out)


def arm64_image(padding: int = 5000) -> bytes:
    """A flat image behind arm64's header."""
    body = BANNER + b"\0" + NAMES + bytes(padding)
    header = struct.pack("<IIQQQQQQ4sI", 0, 0, 0, 64 + len(body) + 4096, 0, 0, 0, 0, b"ARM\x64", 0)
    return header + body


def zboot(packed: bytes) -> bytes:
    """An arm64 image that unpacks itself under EFI."""
    head = struct.pack("<4s4sII8x32s", b"MZ\0\0", b"zimg", 64, len(packed), b"gzip")
    return head.ljust(64, b"\0") + packed


def config(changes: str = "") -> bytes:
    """A kernel configuration; `changes` such as `EXT4_FS=n ACPI=m`."""
    words = dict(word.split("=") for word in f"{CONFIG} {changes}".split())
    set_ = "".join(f"CONFIG_{name}={value}\n" for name, value in words.items() if value != "n")
    return f"# Linux configuration\n{set_}# CONFIG_LZ4 is not set\n".encode()


def module(name: str, depends: Sequence[str], more: Sequence[str] = (), version: str = VERSION) -> bytes:
    said = [f"name={name}", f"depends={','.join(depends)}", *more, f"vermagic={version} SMP mod_unload"]
    return b"\x7fELF module \0" + b"".join(line.encode() + b"\0" for line in said)


def module_tree(root: Path, *, with_dep_file: bool = False) -> Path:
    """`lib/modules/<version>` below a root, as a package holds it or as depmod leaves it."""
    directory = root / "lib" / "modules" / VERSION
    for path, depends in MODULES.items():
        target = directory / "kernel" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(module(target.stem, depends))
    (directory / "modules.builtin").write_text(BUILTIN)
    if with_dep_file:
        (directory / "modules.dep").write_text("".join(_dep_line(path) for path in MODULES))
    return directory


def _dep_line(path: str) -> str:
    """All dependencies, the deepest last, as depmod writes them."""
    by_name = {Path(each).stem: each for each in MODULES}
    order: list[str] = []

    def visit(name: str) -> None:
        for below in MODULES[by_name[name]]:
            visit(below)
        if name not in order:
            order.append(name)

    visit(Path(path).stem)
    below = [f"kernel/{by_name[name]}" for name in reversed(order[:-1])]
    return f"kernel/{path}: {' '.join(below)}".rstrip() + "\n"
