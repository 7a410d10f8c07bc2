# SPDX-License-Identifier: MIT
"""Directories as they read on disk: one block of entries, or an index by hash over many.

Used by `mkfs` only.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from banger import run
from banger.contract import errors
from banger.images.mkfs import dirhash
from banger.images.mkfs.layout import BLOCK, HASH_HALF_MD4

_ENTRY: Final = struct.Struct("<IHBB")
_INDEX: Final = struct.Struct("<II")
_DIRECTORY_TYPE: Final = 2
_DOTS_BYTES: Final = 24
_ROOT_INFO: Final = struct.Struct("<IBBBB")
_COUNT: Final = struct.Struct("<HH")
_ROOT_MAX: Final = (BLOCK - _DOTS_BYTES - _ROOT_INFO.size) // _INDEX.size
_NODE_MAX: Final = (BLOCK - _ENTRY.size) // _INDEX.size
_LEAF_FILL: Final = BLOCK * 7 // 8
"""A leaf has room for a few more names before the guest must split it."""
_BATCH: Final = 4096
_PARTS: Final = 256
_PART_SHIFT: Final = 24
"""Of a hash of 32 bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Names:
    """How a directory's entries are looked at, so that they need not be copied."""

    name: Callable[[int], bytes]
    target: Callable[[int], tuple[int, int]]
    """Inode and file type."""


def blocks(own: int, parent: int, listed: array[int], names: Names, hash_seed: bytes) -> Iterator[bytes]:
    """A directory's content: a block of entries, or an index and as many as are needed."""
    if _DOTS_BYTES + sum(_length(names.name(entry)) for entry in listed) <= BLOCK:
        packed = [_dot(own, b"."), _dot(parent, b".."), *_packed(listed, names)]
        yield _filled(packed)
        return
    yield from _Indexed(listed, names, hash_seed).blocks(own, parent)


class _Indexed:
    """Many entries, in leaves in order of hash. Numbers are kept; a leaf is packed when it is asked for."""

    def __init__(self, listed: array[int], names: Names, hash_seed: bytes) -> None:
        self._names = names
        hashes = _hashes(listed, names, hash_seed)
        self._ordered, self._bounds, self._starts = array("I"), array("I"), array("I")
        size = last = 0
        for number in _in_order(hashes):
            length = _length(names.name(listed[number]))
            if not self._starts or size + length > _LEAF_FILL:
                # The lowest bit says that names of this hash began in the leaf before.
                self._bounds.append(hashes[number] | (bool(self._starts) and hashes[number] == last))
                self._starts.append(len(self._ordered))
                size = 0
            self._ordered.append(listed[number])
            size += length
            last = hashes[number]

    def blocks(self, own: int, parent: int) -> Iterator[bytes]:
        bounds, leaves = self._bounds, len(self._bounds)
        if leaves <= _ROOT_MAX:
            yield _root(own, parent, 0, _numbered(bounds, 1))
        else:
            parts = [range(start, min(start + _NODE_MAX, leaves)) for start in range(0, leaves, _NODE_MAX)]
            if len(parts) > _ROOT_MAX:
                raise errors.BadRequestError(
                    f"a directory of {len(self._ordered)} entries is larger than ext4 can hold"
                )
            yield _root(own, parent, 1, _numbered([bounds[part.start] for part in parts], 1))
            for part in parts:
                yield _node(_numbered(bounds[part.start : part.stop], 1 + len(parts) + part.start))
        for start, end in itertools.pairwise((*self._starts, len(self._ordered))):
            yield _filled(_packed(self._ordered[start:end], self._names))


def _hashes(listed: array[int], names: Names, hash_seed: bytes) -> array[int]:
    found = array("I")
    for start in range(0, len(listed), _BATCH):
        run.check_cancelled()
        batch = [names.name(entry) for entry in listed[start : start + _BATCH]]
        found += dirhash.hashes(batch, hash_seed)
    return found


def _in_order(hashes: array[int]) -> Iterator[int]:
    """Places in order of their hash, by parts: a list of them all would take ten times as much memory."""
    parts = [array("I") for _ in range(_PARTS)]
    for number, each in enumerate(hashes):
        parts[each >> _PART_SHIFT].append(number)
    for part in parts:
        yield from sorted(part, key=hashes.__getitem__)


def _packed(entries: Sequence[int], names: Names) -> Iterator[bytes]:
    for entry in entries:
        name = names.name(entry)
        inode, kind = names.target(entry)
        length = _length(name)
        yield (_ENTRY.pack(inode, length, len(name), kind) + name).ljust(length, b"\0")


def _length(name: bytes) -> int:
    return _ENTRY.size + len(name) + 3 & ~3


def _dot(inode: int, name: bytes, length: int = 12) -> bytes:
    return (_ENTRY.pack(inode, length, len(name), _DIRECTORY_TYPE) + name).ljust(12, b"\0")


def _filled(packed: Sequence[bytes] | Iterator[bytes]) -> bytes:
    """One block; its last entry reaches to the end."""
    *front, last = packed
    before = b"".join(front)
    inode, _, name_length, kind = _ENTRY.unpack_from(last)
    head = _ENTRY.pack(inode, BLOCK - len(before), name_length, kind)
    return (before + head + last[_ENTRY.size :]).ljust(BLOCK, b"\0")


def _numbered(bounds: Sequence[int], first_block: int) -> list[tuple[int, int]]:
    return [(bound, first_block + number) for number, bound in enumerate(bounds)]


def _root(own: int, parent: int, levels: int, index: list[tuple[int, int]]) -> bytes:
    head = _dot(own, b".") + _dot(parent, b"..", BLOCK - 12)
    info = _ROOT_INFO.pack(0, HASH_HALF_MD4, _ROOT_INFO.size, levels, 0)
    return (head + info + _index(index, _ROOT_MAX)).ljust(BLOCK, b"\0")


def _node(index: list[tuple[int, int]]) -> bytes:
    return (_ENTRY.pack(0, BLOCK, 0, 0) + _index(index, _NODE_MAX)).ljust(BLOCK, b"\0")


def _index(index: list[tuple[int, int]], limit: int) -> bytes:
    """The first place holds the counts, as everything below the second hash belongs to the first block."""
    head = _COUNT.pack(limit, len(index)) + struct.pack("<I", index[0][1])
    return head + b"".join(_INDEX.pack(bound, block) for bound, block in index[1:])
