# SPDX-License-Identifier: MIT
"""The end of making a file system: journal, inode tables, bitmaps, descriptors, superblocks.

A group that has content, or was taken by the metadata of others, gets its own metadata wherever there is
room. An untouched group has it at its start, where the kernel and e2fsck expect it without being told.
Used by `mkfs` only.
"""

from __future__ import annotations

import dataclasses
import stat
from typing import Final

from banger import run
from banger.images.mkfs import extents, files, inodes, journal, layout, space

_CHUNK_INODES: Final = 256 * layout.INODES_PER_BLOCK
_JOURNAL_MODE: Final = stat.S_IFREG | 0o600
_SMALLEST_JOURNAL_PIECE: Final = 64
_MIB: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where the metadata of a group lies."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Inodes:
    """What a group's inode table holds."""

    bitmap: int
    used: int
    directories: int
    highest: int
    """Places in use at the start of the table, those free in between included."""


class Writer:
    """Writes everything that follows the content. Used once."""

    def __init__(self, made: files.Files, shape: layout.Geometry) -> None:
        self._disk = made.disk
        self._space = made.space
        self._nodes = made.inodes
        self._reuses = made.freed
        self._shape = shape
        self._places: list[_Place] = []
        self._last: _Place | None = None

    def write(self, identity: layout.Identity) -> None:
        shape = self._shape
        if self._nodes.last > shape.inodes:
            raise space.DiskTooSmallError(
                f"{self._nodes.used} files do not fit into a disk of {shape.blocks * layout.BLOCK >> 20} MiB"
            )
        self._space.fix_size(shape.blocks, 1 + shape.descriptor_blocks)
        if self._reuses:
            for start, end in self._space.free_runs():
                self._disk.punch(start, end - start)
        self._place_last()
        self._place_touched()
        journal_map = self._write_journal()
        self._place_touched()
        self._space.settle()
        self._write_groups(identity, journal_map)

    def _place_last(self) -> None:
        """The last group may be too short for its own metadata."""
        last, shape = self._shape.groups - 1, self._shape
        if shape.blocks_of(last) < shape.front(last) + 2 + shape.table_blocks:
            self._last = self._take_place()

    def _place_touched(self) -> None:
        while len(self._places) < self._space.groups:
            is_last = len(self._places) == self._shape.groups - 1
            self._places.append(self._last if is_last and self._last is not None else self._take_place())

    def _take_place(self) -> _Place:
        bitmaps = self._space.allocate_run(2)
        return _Place(bitmaps, bitmaps + 1, self._space.allocate_run(self._shape.table_blocks))

    def _write_journal(self) -> bytes:
        """The block map of the journal's inode; empty if the disk is too small to have one."""
        length = self._shape.journal_blocks
        if length == 0:
            return b""
        tree = extents.Tree(self._store_node)
        first, at, piece = 0, 0, min(length, layout.BLOCKS_PER_GROUP // 2)
        while at < length:
            piece = min(piece, length - at)
            try:
                start = self._space.allocate_run(piece)
            except space.DiskTooSmallError:
                if piece <= _SMALLEST_JOURNAL_PIECE:
                    raise
                piece //= 2
                continue
            first = first if at else start
            tree.add(at, start, piece)
            at += piece
        self._disk.write(first, journal.superblock(length))
        root = tree.root()
        record = inodes.Record(
            *(_JOURNAL_MODE, inodes.ROOT, 0, 0, 0, 0, 1, 0, length * layout.BLOCK),
            *(self._nodes.roots.add(root), tree.blocks),
        )
        self._nodes.put(layout.JOURNAL_INODE, record)
        return root

    def _store_node(self, node: bytes) -> int:
        block = self._space.allocate_run(1)
        self._disk.write(block, node)
        return block

    def _write_groups(self, identity: layout.Identity, journal_map: bytes) -> None:
        shape = self._shape
        self._disk.resize(shape.blocks * layout.BLOCK)
        form = layout.DescriptorFormat(identity.uuid)
        descriptors = bytearray()
        free_blocks = free_inodes = 0
        for number in range(shape.groups):
            run.check_cancelled()
            group = self._untouched(number) or self._write_group(number)
            free_blocks += group.free_blocks
            free_inodes += group.free_inodes
            descriptors += form.pack(number, group)
        free = layout.Free(free_blocks, free_inodes)
        for number in shape.copies():
            block = layout.superblock(
                shape,
                identity,
                free,
                journal=journal_map,
                journal_bytes=shape.journal_blocks * layout.BLOCK,
                group=number,
            )
            self._disk.write(number * layout.BLOCKS_PER_GROUP, block + descriptors)
        self._disk.flush()

    def _untouched(self, number: int) -> layout.Group | None:
        """The descriptor that says that nothing of a group was ever written; never that of the last one."""
        shape = self._shape
        if number < len(self._places) or number == shape.groups - 1:
            return None
        if number * shape.inodes_per_group < self._nodes.last:
            return None
        place = self._own_place(number)
        taken = shape.front(number) + 2 + shape.table_blocks
        return layout.Group(
            block_bitmap=place.block_bitmap,
            inode_bitmap=place.inode_bitmap,
            inode_table=place.inode_table,
            free_blocks=layout.BLOCKS_PER_GROUP - taken,
            free_inodes=shape.inodes_per_group,
            used_directories=0,
            flags=layout.BG_INODE_ZEROED | layout.BG_INODE_UNINIT | layout.BG_BLOCK_UNINIT,
            unused_inodes=shape.inodes_per_group,
        )

    def _write_group(self, number: int) -> layout.Group:
        """Writes a group's inodes and bitmaps as far as they are not empty; gives its descriptor."""
        shape = self._shape
        held = self._inodes_of(number)
        flags = layout.BG_INODE_ZEROED
        if number < len(self._places):
            place, bitmap = self._places[number], self._bitmap_of(number)
        else:
            place, bitmap = self._own_place(number), self._own_bitmap(number)
        self._disk.write(place.block_bitmap, bitmap.to_bytes(layout.BLOCK, "little"))
        if held.used:
            self._write_table(number, place.inode_table, held.highest)
            padding = (1 << 8 * layout.BLOCK) - (1 << shape.inodes_per_group)
            self._disk.write(place.inode_bitmap, (held.bitmap | padding).to_bytes(layout.BLOCK, "little"))
        else:
            flags |= layout.BG_INODE_UNINIT
        return layout.Group(
            block_bitmap=place.block_bitmap,
            inode_bitmap=place.inode_bitmap,
            inode_table=place.inode_table,
            free_blocks=layout.BLOCKS_PER_GROUP - bitmap.bit_count(),
            free_inodes=shape.inodes_per_group - held.used,
            used_directories=held.directories,
            flags=flags,
            unused_inodes=shape.inodes_per_group - held.highest,
        )

    def _bitmap_of(self, number: int) -> int:
        size = layout.BLOCKS_PER_GROUP // 8
        return int.from_bytes(self._space.bitmap[number * size : (number + 1) * size], "little")

    def _own_place(self, number: int) -> _Place:
        """Of a group that no other group's metadata, nor content, touched."""
        if number == self._shape.groups - 1 and self._last is not None:
            return self._last
        start = number * layout.BLOCKS_PER_GROUP + self._shape.front(number)
        return _Place(start, start + 1, start + 2)

    def _own_bitmap(self, number: int) -> int:
        shape = self._shape
        taken = shape.front(number)
        if number < shape.groups - 1 or self._last is None:
            taken += 2 + shape.table_blocks
        beyond = (1 << layout.BLOCKS_PER_GROUP) - (1 << shape.blocks_of(number))
        return (1 << taken) - 1 | beyond

    def _inodes_of(self, group: int) -> _Inodes:
        each = self._shape.inodes_per_group
        first = group * each + 1
        used = directories = highest = 0
        marks = bytearray(-(-each // 8))
        for number in range(first, min(first + each, self._nodes.last + 1)):
            mode = self._nodes.mode(number)
            if mode or number < layout.FIRST_INODE:
                highest = number - first + 1
                marks[(number - first) >> 3] |= 1 << ((number - first) & 7)
                used += 1
                directories += stat.S_ISDIR(mode)
        return _Inodes(int.from_bytes(marks, "little"), used, directories, highest)

    def _write_table(self, group: int, table: int, highest: int) -> None:
        first = group * self._shape.inodes_per_group + 1
        for start in range(0, highest, _CHUNK_INODES):
            run.check_cancelled()
            numbers = range(first + start, first + min(start + _CHUNK_INODES, highest))
            data = b"".join(map(self._nodes.encode, numbers))
            self._disk.write(table + start // layout.INODES_PER_BLOCK, data)


def smallest(made: files.Files, headroom_bytes: int) -> layout.Geometry:
    """The shape of the smallest file system that has the content and so much room left, in whole MiB."""
    blocks, nodes = made.space, made.inodes
    highest = blocks.highest() + 1
    size = max(highest, blocks.used + headroom_bytes // layout.BLOCK) * layout.BLOCK
    while True:
        size = -(-size // _MIB) * _MIB
        shape = layout.geometry(size, nodes.used)
        # A place for inodes is in one piece: before each copy of the superblock some blocks may stay free.
        broken = shape.table_blocks * (1 + sum(space_start < highest for space_start in _copies(shape)))
        needed = max(
            blocks.used + shape.metadata_blocks() + -(-headroom_bytes // layout.BLOCK),
            highest + shape.metadata_blocks() + broken,
        )
        if needed <= shape.blocks and nodes.used * 5 // 4 + layout.FIRST_INODE <= shape.inodes:
            return shape
        missing = max(needed - shape.blocks, 1)
        if needed <= shape.blocks:
            missing = layout.BLOCKS_PER_GROUP
        size += missing * layout.BLOCK


def _copies(shape: layout.Geometry) -> list[int]:
    return [group * layout.BLOCKS_PER_GROUP for group in shape.copies()]
