# SPDX-License-Identifier: MIT
"""Inodes in memory, packed: about 50 bytes each, whatever the file. And as they read on disk.

Used by `mkfs` only.
"""

from __future__ import annotations

import stat
import struct
from typing import Final, NamedTuple

from banger.images.mkfs import attributes, extents, layout, xattrs

# What `where` of a record means.
EMPTY: Final = 0
"""A directory's parent, a device's number, or nothing."""
RUN: Final = 1
"""The first block of the only run."""
ROOT: Final = 2
"""The slot that has the root of the extent tree."""
TARGET: Final = 3
"""The slot that has the target of a symbolic link."""

_FLAG_INDEX: Final = 0x1000
_FLAG_EXTENTS: Final = 0x80000
_MINOR_BITS: Final = 20


class Record(NamedTuple):
    """One inode. A directory's `size` is its first entry until the directory itself is written."""

    mode: int
    layout: int
    uid: int
    gid: int
    mtime: int
    mtime_extra: int
    links: int
    xattr: int
    size: int
    where: int
    blocks: int


_RECORD: Final = struct.Struct("<HBxIIIIIIQII")
_LINKS: Final = struct.Struct("<I")
_LINKS_AT: Final = 20
_MODE: Final = struct.Struct("<H")
_FREE: Final = Record(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
_XATTR_BLOCK: Final = struct.Struct("<I")
_INODE: Final = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII96s")


class Slots:
    """Pieces of one size in one array; slot 0 stands for none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._data = bytearray(size)
        self._free = 0

    @property
    def packed_bytes(self) -> int:
        return len(self._data)

    def add(self, piece: bytes) -> int:
        piece = piece.ljust(self._size, b"\0")
        slot = self._free
        if slot == 0:
            self._data += piece
            return len(self._data) // self._size - 1
        at = slot * self._size
        self._free = int.from_bytes(self._data[at : at + 4], "little")
        self._data[at : at + self._size] = piece
        return slot

    def get(self, slot: int) -> bytes:
        return bytes(self._data[slot * self._size : (slot + 1) * self._size])

    def release(self, slot: int) -> None:
        if slot:
            at = slot * self._size
            self._data[at : at + 4] = self._free.to_bytes(4, "little")
            self._free = slot


class Inodes:
    """All inodes by number, from 1. Released numbers are given out again."""

    def __init__(self) -> None:
        self._records = bytearray(_RECORD.size * layout.FIRST_INODE)
        self._free = 0
        self.used = 0
        """Without the reserved ones."""
        self.roots = Slots(extents.ROOT_BYTES)
        self.bodies = Slots(_XATTR_BLOCK.size + xattrs.BODY_BYTES)

    @property
    def packed_bytes(self) -> int:
        """What all this takes of memory."""
        return len(self._records) + self.roots.packed_bytes + self.bodies.packed_bytes

    @property
    def last(self) -> int:
        return len(self._records) // _RECORD.size - 1

    def add(self, record: Record) -> int:
        self.used += 1
        number = self._free
        if number:
            self._free = self.get(number).where
            self.put(number, record)
            return number
        self._records += _RECORD.pack(*record)
        return self.last

    def get(self, number: int) -> Record:
        return Record._make(_RECORD.unpack_from(self._records, number * _RECORD.size))

    def put(self, number: int, record: Record) -> None:
        _RECORD.pack_into(self._records, number * _RECORD.size, *record)

    def release(self, number: int) -> None:
        self.used -= 1
        self.put(number, _FREE._replace(where=self._free))
        self._free = number

    def mode(self, number: int) -> int:
        """0 for one that is not in use."""
        mode: int = _MODE.unpack_from(self._records, number * _RECORD.size)[0]
        return mode

    def add_links(self, number: int, change: int) -> int:
        at = number * _RECORD.size + _LINKS_AT
        links: int = _LINKS.unpack_from(self._records, at)[0] + change
        _LINKS.pack_into(self._records, at, links)
        return links

    def add_xattrs(self, body: bytes, block: int) -> int:
        """Keeps what an inode has of extended attributes; 0 if it has none."""
        return self.bodies.add(_XATTR_BLOCK.pack(block) + body) if body or block else 0

    def xattrs(self, slot: int) -> tuple[bytes, int]:
        """The body, empty if there is none, and the block or 0."""
        piece = self.bodies.get(slot)
        body = piece[_XATTR_BLOCK.size :]
        return body if any(body) else b"", _XATTR_BLOCK.unpack_from(piece)[0]

    def encode(self, number: int) -> bytes:
        """The inode as it stands in the inode table."""
        record = self.get(number)
        if record.mode == 0:
            return bytes(layout.INODE_BYTES)
        body, xattr_block = self.xattrs(record.xattr) if record.xattr else (b"", 0)
        flags, block_map = self._block_map(record)
        is_directory = stat.S_ISDIR(record.mode)
        if is_directory and record.size > layout.BLOCK:
            flags |= _FLAG_INDEX
        links = 1 if is_directory and record.links > layout.MAX_LINKS else record.links
        sectors = (record.blocks + (xattr_block != 0)) * (layout.BLOCK // 512)
        time, extra = record.mtime, record.mtime_extra
        return _INODE.pack(
            *(record.mode, record.uid & 0xFFFF, record.size & 0xFFFFFFFF, time, time, time, 0),
            *(record.gid & 0xFFFF, links, sectors & 0xFFFFFFFF, flags, 0, block_map),
            *(0, xattr_block, record.size >> 32, 0),
            *(sectors >> 32, 0, record.uid >> 16, record.gid >> 16, 0, 0),
            *(layout.EXTRA_ISIZE, 0, extra, extra, extra, time, extra, 0, 0, xattrs.area(body)),
        )

    def _block_map(self, record: Record) -> tuple[int, bytes]:
        kind = stat.S_IFMT(record.mode)
        if record.layout == RUN:
            return _FLAG_EXTENTS, extents.single(record.where, record.blocks)
        if record.layout == ROOT:
            return _FLAG_EXTENTS, self.roots.get(record.where)
        if record.layout == TARGET:
            return 0, self.roots.get(record.where)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            return 0, struct.pack("<II", *attributes.encode_device(*split_device(record.where)))
        return (_FLAG_EXTENTS, extents.single(0, 0)) if kind == stat.S_IFREG else (0, b"")


def join_device(major: int, minor: int) -> int:
    return major << _MINOR_BITS | minor


def split_device(number: int) -> tuple[int, int]:
    return number >> _MINOR_BITS, number & (1 << _MINOR_BITS) - 1
