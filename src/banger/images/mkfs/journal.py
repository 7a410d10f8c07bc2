# SPDX-License-Identifier: MIT
"""An empty journal: one block says that nothing is to be replayed, the others are never read before written.

Used by `mkfs` only.
"""

from __future__ import annotations

import struct
from typing import Final

from banger.images.mkfs.layout import BLOCK

_MAGIC: Final = 0xC03B3998
_SUPERBLOCK_V2: Final = 4
# Big-endian: header, block size, length, first log block, first sequence, start (0: empty), errno,
# three feature words, uuid, number of users.
_SUPERBLOCK: Final = struct.Struct(">IIIIIIIiIIII16sI")


def superblock(blocks: int) -> bytes:
    """The journal's first block."""
    fields = (_MAGIC, _SUPERBLOCK_V2, 0, BLOCK, blocks, 1, 1, 0, 0, 0, 0, 0, b"", 1)
    return _pack(fields)


def _pack(fields: tuple[int | bytes, ...]) -> bytes:
    return _SUPERBLOCK.pack(*fields).ljust(BLOCK, b"\0")
