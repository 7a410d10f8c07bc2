# SPDX-License-Identifier: MIT
"""The content of a file on its way to the disk: whole blocks, those of zeros left out.

Used by `mkfs` only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Final

from banger import run
from banger.contract import errors
from banger.images.mkfs import extents
from banger.images.mkfs.disk import Disk
from banger.images.mkfs.layout import BLOCK
from banger.images.mkfs.space import Space
from banger.tarstream.hole import Hole

MAX_BYTES: Final = ((1 << 32) - 1) * BLOCK
_ZEROS: Final = bytes(BLOCK)


class Stored:
    """One file being written; `tree` then says where it lies."""

    def __init__(self, disk: Disk, space: Space) -> None:
        self._disk = disk
        self._space = space
        self._at = 0
        self.size = 0
        # Not a method: this and its tree would be a cycle, and wait for the search for garbage.
        self.tree = extents.Tree(functools.partial(_store_node, disk, space))

    def take(self, content: Iterable[bytes | memoryview | Hole], limit: int = MAX_BYTES) -> None:
        """Writes everything; more than `limit` is refused before it is written."""
        rest = bytearray()
        for piece in content:
            run.check_cancelled()
            length = piece.length if isinstance(piece, Hole) else len(piece)
            self.size += length
            if self.size > limit:
                raise errors.BadRequestError(f"a file is larger than the {limit} bytes it may have")
            rest = self._skip(rest, length) if isinstance(piece, Hole) else self._take_piece(rest, piece)
        if rest:
            rest += bytes(BLOCK - len(rest))
            self._take_blocks(memoryview(rest))

    def _take_piece(self, rest: bytearray, piece: bytes | memoryview) -> bytearray:
        """Writes what makes whole blocks and gives back the rest."""
        if len(rest) + len(piece) < BLOCK:
            rest += piece
            return rest
        view = memoryview(piece)
        if rest:
            missing = BLOCK - len(rest)
            self._take_blocks(memoryview(rest + view[:missing]))
            view = view[missing:]
        whole = len(view) - len(view) % BLOCK
        if whole:
            self._take_blocks(view[:whole])
        return bytearray(view[whole:])

    def _skip(self, rest: bytearray, length: int) -> bytearray:
        if rest:
            filling = min(BLOCK - len(rest), length)
            rest += bytes(filling)
            length -= filling
            if len(rest) < BLOCK:
                return rest
            self._take_blocks(memoryview(rest))
        self._at += length // BLOCK
        return bytearray(length % BLOCK)

    def _take_blocks(self, view: memoryview) -> None:
        """Only a block whose first byte is zero can be all zeros, and few are: looking at those is cheap."""
        if 0 not in view[::BLOCK].tobytes():
            self._write(view)
            return
        start = 0
        for at in range(0, len(view), BLOCK):
            if view[at] == 0 and view[at : at + BLOCK].tobytes() == _ZEROS:
                self._write(view[start:at])
                self._at += 1
                start = at + BLOCK
        self._write(view[start:])

    def _write(self, view: memoryview) -> None:
        while view:
            start, count = self._space.allocate(len(view) // BLOCK)
            self.tree.add(self._at, start, count)
            self._disk.write(start, view[: count * BLOCK])
            self._at += count
            view = view[count * BLOCK :]


def _store_node(disk: Disk, space: Space, node: bytes) -> int:
    start, _ = space.allocate(1)
    disk.write(start, node)
    return start
