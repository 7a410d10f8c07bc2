# SPDX-License-Identifier: MIT
"""Extent trees: where the blocks of a file lie.

Leaves are written as soon as they are full, so that even a file in a million pieces takes little memory;
what an inode keeps is the root of 60 bytes. Used by `mkfs` only.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final

from banger.images.mkfs.layout import BLOCK

MAX_RUN: Final = 1 << 15
ROOT_BYTES: Final = 60
_MAGIC: Final = 0xF30A
_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")
_INDEX: Final = struct.Struct("<IIHH")
_ENTRY: Final = 12
_ROOT_MAX: Final = (ROOT_BYTES - _HEADER.size) // _ENTRY
_NODE_MAX: Final = (BLOCK - _HEADER.size) // _ENTRY


class Tree:
    """Takes the runs of a file in their order; `store` writes a block of the tree and says where."""

    def __init__(self, store: Callable[[bytes], int]) -> None:
        self._store = store
        self._levels: list[bytearray] = [bytearray()]
        self._logical = self._physical = self._count = 0
        self.blocks = 0
        """Taken so far, by the content and by the tree itself."""

    def add(self, logical: int, physical: int, count: int) -> None:
        self.blocks += count
        if (
            self._count
            and logical == self._logical + self._count
            and physical == self._physical + self._count
        ):
            self._count += count
        else:
            self._close_run()
            self._logical, self._physical, self._count = logical, physical, count
        while self._count > MAX_RUN:
            rest = self._count - MAX_RUN
            self._count = MAX_RUN
            self._close_run()
            self._logical += MAX_RUN
            self._physical += MAX_RUN
            self._count = rest

    def only_run(self) -> tuple[int, int] | None:
        """Start and length, if the file is one run from its beginning on."""
        if len(self._levels) == 1 and not self._levels[0] and self._count and self._logical == 0:
            return self._physical, self._count
        return None

    def root(self) -> bytes:
        """Ends the tree."""
        self._close_run()
        self._count = 0
        depth = 0
        while depth < len(self._levels) - 1 or len(self._levels[depth]) > _ROOT_MAX * _ENTRY:
            self._spill(depth)
            depth += 1
        return _node(self._levels[depth], _ROOT_MAX, depth).ljust(ROOT_BYTES, b"\0")

    def _close_run(self) -> None:
        if self._count:
            self._push(0, _EXTENT.pack(self._logical, self._count, 0, self._physical))

    def _push(self, depth: int, entry: bytes) -> None:
        if depth == len(self._levels):
            self._levels.append(bytearray())
        if len(self._levels[depth]) == _NODE_MAX * _ENTRY:
            self._spill(depth)
        self._levels[depth] += entry

    def _spill(self, depth: int) -> None:
        entries = self._levels[depth]
        first = int.from_bytes(entries[:4], "little")
        block = self._store(_node(entries, _NODE_MAX, depth))
        self.blocks += 1
        self._levels[depth] = bytearray()
        self._push(depth + 1, _INDEX.pack(first, block, 0, 0))


def single(physical: int, count: int) -> bytes:
    """The root of a file that is one run from its beginning on, or of an empty one."""
    entries = _EXTENT.pack(0, count, 0, physical) if count else b""
    return _node(entries, _ROOT_MAX, 0).ljust(ROOT_BYTES, b"\0")


def runs(node: bytes, read: Callable[[int], bytes]) -> Iterator[tuple[int, int, int]]:
    """Logical start, physical start and length of each run below a node."""
    depth, entries = _entries(node)
    for at in entries:
        if depth:
            yield from runs(read(_INDEX.unpack_from(node, at)[1]), read)
        else:
            logical, count, _, physical = _EXTENT.unpack_from(node, at)
            yield logical, physical, count


def tree_blocks(node: bytes, read: Callable[[int], bytes]) -> Iterator[int]:
    """The blocks that the tree itself takes below a node."""
    depth, entries = _entries(node)
    if depth == 0:
        return
    for at in entries:
        block = _INDEX.unpack_from(node, at)[1]
        yield block
        if depth > 1:
            yield from tree_blocks(read(block), read)


def _entries(node: bytes) -> tuple[int, range]:
    _, count, _, depth, _ = _HEADER.unpack_from(node)
    return depth, range(_HEADER.size, _HEADER.size + count * _ENTRY, _ENTRY)


def _node(entries: bytes | bytearray, limit: int, depth: int) -> bytes:
    return _HEADER.pack(_MAGIC, len(entries) // _ENTRY, limit, depth, 0) + entries
