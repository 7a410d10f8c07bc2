# SPDX-License-Identifier: MIT
"""Small things shaped like kernels, modules and packages, for tests that need no real ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from banger.kernels import elf, lz4

VERSION = "6.1.0-9-test"
BANNER = f"Linux version {VERSION} (nobody@nowhere) #1 SMP".encode()
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


def vmlinux(padding: int = 5000) -> bytes:
    """An ELF that passes for a kernel."""
    return elf.wrap(BANNER + bytes(padding), load_address=0x1000000, entry_address=0x1000010)


def bzimage(payload: bytes) -> bytes:
    """A boot sector, one setup sector, and the payload at offset 0x100 of the protected-mode part."""
    setup = bytearray(2 * 512)
    setup[0x1F1] = 1
    setup[510:512] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, 0x020F)
    struct.pack_into("<II", setup, 0x248, 0x100, len(payload))
    return bytes(setup) + bytes(0x100) + payload


def lz4_frame(data: bytes, block_bytes: int = 1 << 16) -> bytes:
    """A legacy frame made by a simple greedy compressor."""
    out = bytearray(lz4.MAGIC)
    for start in range(0, len(data), block_bytes):
        block = lz4_block(data[start : start + block_bytes])
        out += struct.pack("<I", len(block)) + block
    return bytes(out)


def lz4_block(data: bytes) -> bytes:
    out, anchor, position = bytearray(), 0, 0
    seen: dict[bytes, int] = {}
    while position + 12 < len(data):
        key = data[position : position + 4]
        match = seen.get(key, -1)
        seen[key] = position
        if match < 0 or position - match > 0xFFFF:
            position += 1
            continue
        length = 4
        while position + length < len(data) - 5 and data[match + length] == data[position + length]:
            length += 1
        out += _sequence(data[anchor:position], position - match, length)
        position += length
        anchor = position
    return bytes(out + _sequence(data[anchor:], 0, 0))


def _sequence(literals: bytes, distance: int, match: int) -> bytes:
    """A match of length 0 ends the block."""
    extra = max(0, match - 4)
    token = min(15, len(literals)) << 4 | min(15, extra)
    out = bytes([token]) + _length(len(literals)) + literals
    return out + (struct.pack("<H", distance) + _length(extra) if match else b"")


def _length(value: int) -> bytes:
    if value < 15:
        return b""
    full, rest = divmod(value - 15, 255)
    return b"\xff" * full + bytes([rest])


def module(name: str, depends: Sequence[str]) -> bytes:
    return b"\x7fELF module \0name=%b\0depends=%b\0" % (name.encode(), ",".join(depends).encode())


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
