# SPDX-License-Identifier: MIT
"""Where things lie in an ext4 file system and how its superblock and group descriptors read on disk.

Names of fields and flags are those of the kernel's fs/ext4/ext4.h. Used by `mkfs` only.
"""

from __future__ import annotations

import dataclasses
import struct
import time
from typing import Final

BLOCK: Final = 4096
BLOCKS_PER_GROUP: Final = 8 * BLOCK
MAX_BLOCKS: Final = (1 << 32) - 1
INODE_BYTES: Final = 256
INODES_PER_BLOCK: Final = BLOCK // INODE_BYTES
MAX_INODES_PER_GROUP: Final = 8 * BLOCK
BYTES_PER_INODE: Final = 16384
EXTRA_ISIZE: Final = 32
FIRST_INODE: Final = 11
ROOT_INODE: Final = 2
JOURNAL_INODE: Final = 8
FAST_SYMLINK_BYTES: Final = 60
MAX_LINKS: Final = 65000

DESCRIPTOR_BYTES: Final = 32
_DESCRIPTORS_PER_BLOCK: Final = BLOCK // DESCRIPTOR_BYTES
FRONT: Final = 1 + -(-MAX_BLOCKS // BLOCKS_PER_GROUP) // _DESCRIPTORS_PER_BLOCK
"""Superblock and descriptors of the largest file system: content keeps off these first blocks of a group
that has a copy of them, as the final size is not known while content is written."""
_SMALLEST_LAST_GROUP: Final = 50

COMPAT_HAS_JOURNAL: Final = 0x4
_COMPAT: Final = 0x8 | 0x20  # ext_attr, dir_index
_INCOMPAT: Final = 0x2 | 0x40 | 0x200  # filetype, extents, flex_bg
# sparse_super, large_file, huge_file, gdt_csum, dir_nlink, extra_isize
_RO_COMPAT: Final = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40
HASH_HALF_MD4: Final = 1
_FLAGS_UNSIGNED_HASH: Final = 0x2
_MOUNT_XATTR_ACL: Final = 0xC
_LOG_GROUPS_PER_FLEX: Final = 4
_STATE_VALID: Final = 1

BG_INODE_UNINIT: Final = 0x1
BG_BLOCK_UNINIT: Final = 0x2
BG_INODE_ZEROED: Final = 0x4

_SUPERBLOCK: Final = struct.Struct(
    "<11I I I HhHHHH 4I HH I HH III 16s 16s 64s I BBH 16s III 16s BBH III 68s III HH I HHQI BBBB Q"
)
_SUPERBLOCK_BYTES: Final = 1024
_BEHIND_S: Final = 0.02
"""time(2), by which e2fsck judges, is up to a tick of the kernel behind the clock: 10 ms at HZ=100."""
_SUPERBLOCK_AT: Final = 1024
_DESCRIPTOR: Final = struct.Struct("<IIIHHHHIHHHH")


def has_copy(group: int) -> bool:
    """Whether a group starts with a superblock and descriptors (sparse_super): 0, 1, powers of 3, 5, 7."""
    if group <= 1:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a file system of a given size."""

    blocks: int
    inodes_per_group: int

    @property
    def groups(self) -> int:
        return -(-self.blocks // BLOCKS_PER_GROUP)

    @property
    def inodes(self) -> int:
        return self.groups * self.inodes_per_group

    @property
    def descriptor_blocks(self) -> int:
        return -(-self.groups // _DESCRIPTORS_PER_BLOCK)

    @property
    def table_blocks(self) -> int:
        return self.inodes_per_group // INODES_PER_BLOCK

    @property
    def journal_blocks(self) -> int:
        """As mke2fs chooses it; none where it would take most of the disk."""
        for below, blocks in (
            (2048, 0),
            (32768, 1024),
            (256 << 10, 4096),
            (512 << 10, 8192),
            (4096 << 10, 16384),
            (8192 << 10, 32768),
            (16384 << 10, 65536),
        ):
            if self.blocks < below:
                return blocks
        return 131072

    def copies(self) -> list[int]:
        return [group for group in range(self.groups) if has_copy(group)]

    def front(self, group: int) -> int:
        """How many blocks superblock and descriptors take at the start of a group."""
        return 1 + self.descriptor_blocks if has_copy(group) else 0

    def blocks_of(self, group: int) -> int:
        return min(BLOCKS_PER_GROUP, self.blocks - group * BLOCKS_PER_GROUP)

    def metadata_blocks(self) -> int:
        """Everything but the content, its directories and extent trees."""
        fronts = (1 + self.descriptor_blocks) * len(self.copies())
        return fronts + self.groups * (2 + self.table_blocks) + self.journal_blocks


def geometry(size_bytes: int, used_inodes: int) -> Geometry:
    """The shape for a size: an inode for each 16 KiB, and at least as many free ones as used ones."""
    blocks = min(size_bytes // BLOCK, MAX_BLOCKS)
    shape = Geometry(blocks, 0)
    last = shape.groups - 1
    if last > 0 and shape.blocks_of(last) < shape.front(last) + _SMALLEST_LAST_GROUP:
        shape = Geometry(last * BLOCKS_PER_GROUP, 0)
    wanted = max(size_bytes // BYTES_PER_INODE, 2 * used_inodes, FIRST_INODE + 1)
    each = -(-wanted // max(shape.groups, 1))
    rounded = -(-each // INODES_PER_BLOCK) * INODES_PER_BLOCK
    return dataclasses.replace(shape, inodes_per_group=min(rounded, MAX_INODES_PER_GROUP))


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """What tells one file system from another of the same shape."""

    uuid: bytes
    hash_seed: bytes
    label: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Free:
    """What the superblock says is left."""

    blocks: int
    inodes: int


def superblock(
    shape: Geometry, identity: Identity, free: Free, *, journal: bytes, journal_bytes: int, group: int
) -> bytes:
    """The superblock as it stands in a group; `journal` is the block map of the journal's inode, or empty.

    Copies are never marked clean, so that one is not taken for the superblock by mistake.
    """
    now = int(time.time() - _BEHIND_S)
    backup = (
        journal + struct.pack("<II", journal_bytes >> 32, journal_bytes & 0xFFFFFFFF) if journal else b""
    )
    fields = _SUPERBLOCK.pack(
        *(shape.inodes, shape.blocks, 0, free.blocks, free.inodes, 0, 2, 2, BLOCKS_PER_GROUP),
        *(BLOCKS_PER_GROUP, shape.inodes_per_group, 0, now),
        *(0, -1, 0xEF53, _STATE_VALID if group == 0 else 0, 1, 0),
        *(now, 0, 0, 1),
        *(0, 0, FIRST_INODE, INODE_BYTES, group & 0xFFFF),
        *(_COMPAT | (COMPAT_HAS_JOURNAL if journal else 0), _INCOMPAT, _RO_COMPAT),
        *(identity.uuid, identity.label, b"", 0, 0, 0, 0, b""),
        *(JOURNAL_INODE if journal else 0, 0, 0, identity.hash_seed, HASH_HALF_MD4, 1 if journal else 0, 0),
        *(_MOUNT_XATTR_ACL, 0, now, backup, 0, 0, 0, EXTRA_ISIZE, EXTRA_ISIZE, _FLAGS_UNSIGNED_HASH),
        *(0, 0, 0, 0, _LOG_GROUPS_PER_FLEX, 0, 0, 0, 0),
    )
    block = fields.ljust(_SUPERBLOCK_BYTES, b"\0")
    at = _SUPERBLOCK_AT if group == 0 else 0
    return bytes(at) + block + bytes(BLOCK - at - len(block))


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """One group's descriptor."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    used_directories: int
    flags: int
    unused_inodes: int
    """At the end of the table; never read."""


class DescriptorFormat:
    """Descriptors with the checksum that lets the kernel and e2fsck believe the flags."""

    def __init__(self, uuid: bytes) -> None:
        self._seed = _crc16(0xFFFF, uuid)

    def pack(self, number: int, group: Group) -> bytes:
        fields = (
            group.block_bitmap,
            group.inode_bitmap,
            group.inode_table,
            group.free_blocks,
            group.free_inodes,
            group.used_directories,
            group.flags,
            *(0, 0, 0),
            group.unused_inodes,
        )
        head = _DESCRIPTOR.pack(*fields, 0)[:-2]
        return head + struct.pack("<H", _crc16(self._seed, struct.pack("<I", number) + head))


def _crc16_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC16: Final = _crc16_table()


def _crc16(crc: int, data: bytes) -> int:
    for byte in data:
        crc = crc >> 8 ^ _CRC16[(crc ^ byte) & 0xFF]
    return crc
