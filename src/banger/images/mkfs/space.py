# SPDX-License-Identifier: MIT
"""Which blocks are taken: a bitmap that grows by whole groups as content arrives.

Blocks are taken from the lowest free ones on, so that what is freed is used again. Used by `mkfs` only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from banger.contract import errors
from banger.images.mkfs import layout

_NOT_FULL: Final = re.compile(rb"[^\xff]", re.DOTALL)
_NOT_EMPTY: Final = re.compile(rb"[^\0]", re.DOTALL)
_GROUP_BYTES: Final = layout.BLOCKS_PER_GROUP // 8


class DiskTooSmallError(errors.BadRequestError):
    """The content, or what the file system itself needs, does not fit into the size that is allowed."""


class Space:
    """Hands out runs of blocks; the superblock's and descriptors' places are kept free of content."""

    def __init__(self, max_blocks: int) -> None:
        self.bitmap = bytearray()
        self.used = 0
        """Blocks handed out and not given back."""
        self._max_blocks = min(max_blocks, layout.MAX_BLOCKS)
        self._search_from = 0
        # The free run being used up: marked in the bitmap only when it is left.
        self._window_start = self._next = self._window_end = 0
        self._front = layout.FRONT
        self._reserved: dict[int, int] = {}
        self._fixed = False

    @property
    def groups(self) -> int:
        return len(self.bitmap) // _GROUP_BYTES

    def allocate(self, wanted: int) -> tuple[int, int]:
        """The start and length of a run of at most so many blocks."""
        if self._next == self._window_end:
            self._open_window()
        start = self._next
        count = min(wanted, self._window_end - start)
        if self.used + count > self._max_blocks:
            raise self._too_small()
        self._next += count
        self.used += count
        return start, count

    def allocate_run(self, count: int) -> int:
        """The start of a run of exactly so many blocks."""
        self.settle()
        at = self._search_from
        while True:
            found = free_run(self.bitmap, at)
            if found is None:
                self._add_group()
                continue
            start, end = found
            if end - start >= count:
                break
            if end == 8 * len(self.bitmap):
                self._add_group()  # it may go on there
            else:
                at = end
        mark(self.bitmap, start, count)
        self.used += count
        return start

    def free(self, start: int, count: int) -> None:
        self.settle()
        unmark(self.bitmap, start, count)
        self._search_from = min(self._search_from, start)
        self.used -= count

    def settle(self) -> None:
        """Brings the bitmap up to date."""
        if self._next != self._window_start:
            mark(self.bitmap, self._window_start, self._next - self._window_start)
            self._search_from = self._next
        self._window_start = self._window_end = self._next

    def fix_size(self, blocks: int, front: int) -> None:
        """From now on the file system has so many blocks; what fronts turn out not to need is free."""
        self._max_blocks = blocks
        if self.highest() >= blocks:
            raise self._too_small()
        for group, reserved in self._reserved.items():
            unmark(self.bitmap, group * layout.BLOCKS_PER_GROUP, reserved)
            mark(self.bitmap, group * layout.BLOCKS_PER_GROUP, front)
        self.used += front * len(self._reserved)
        self._front, self._fixed, self._search_from = front, True, 0
        self._cut()

    def highest(self) -> int:
        """The last block in use. Only right before `fix_size`: a front counts as nothing."""
        self.settle()
        bits = len(self.bitmap) * 8
        while bits:
            group = bits // layout.BLOCKS_PER_GROUP - 1
            first = group * layout.BLOCKS_PER_GROUP + self._reserved.get(group, 0)
            window = int.from_bytes(self.bitmap[first // 8 : bits // 8], "little") >> first % 8
            if window:
                return first + window.bit_length() - 1
            bits -= layout.BLOCKS_PER_GROUP
        return 0

    def free_runs(self) -> Iterator[tuple[int, int]]:
        """Start and end of what is free among the groups in use."""
        self.settle()
        at = 0
        while found := free_run(self.bitmap, at):
            yield found
            at = found[1]

    def _open_window(self) -> None:
        self.settle()
        found = free_run(self.bitmap, self._search_from)
        while found is None:
            self._add_group()
            found = free_run(self.bitmap, self._search_from)
        self._window_start, self._window_end = found
        self._next = self._window_start

    def _add_group(self) -> None:
        group = self.groups
        start = group * layout.BLOCKS_PER_GROUP
        if start >= (self._max_blocks if self._fixed else layout.MAX_BLOCKS):
            raise self._too_small()
        self.bitmap += bytes(_GROUP_BYTES)
        if layout.has_copy(group):
            mark(self.bitmap, start, self._front)
            self._reserved[group] = self._front
        if self._fixed:
            self._cut()

    def _cut(self) -> None:
        """What lies beyond the end is never free."""
        beyond = 8 * len(self.bitmap) - self._max_blocks
        if beyond > 0:
            mark(self.bitmap, self._max_blocks, beyond)

    def _too_small(self) -> DiskTooSmallError:
        mib = self._max_blocks * layout.BLOCK >> 20
        return DiskTooSmallError(f"the content does not fit into a disk of {mib} MiB")


def mark(bitmap: bytearray, start: int, count: int) -> None:
    """Sets a run of bits."""
    end = start + count
    first, last = start >> 3, end >> 3
    if first == last:
        bitmap[first] |= (1 << (end & 7)) - (1 << (start & 7))
        return
    bitmap[first] |= 0x100 - (1 << (start & 7))
    bitmap[first + 1 : last] = b"\xff" * (last - first - 1)
    if end & 7:
        bitmap[last] |= (1 << (end & 7)) - 1


def unmark(bitmap: bytearray, start: int, count: int) -> None:
    """Clears a run of bits."""
    end = start + count
    first, last = start >> 3, end >> 3
    if first == last:
        bitmap[first] &= ~((1 << (end & 7)) - (1 << (start & 7)))
        return
    bitmap[first] &= (1 << (start & 7)) - 1
    bitmap[first + 1 : last] = bytes(last - first - 1)
    if end & 7:
        bitmap[last] &= 0x100 - (1 << (end & 7))


def free_run(bitmap: bytearray, at: int) -> tuple[int, int] | None:
    """The first run of clear bits from a place on: its start and its end."""
    byte, bit = at >> 3, at & 7
    if byte >= len(bitmap):
        return None
    clear = ~bitmap[byte] & 0xFF & 0xFF << bit
    if not clear:
        match = _NOT_FULL.search(bitmap, byte + 1)
        if match is None:
            return None
        byte = match.start()
        clear = ~bitmap[byte] & 0xFF
    start = byte * 8 + _lowest(clear)
    taken = bitmap[byte] & 0xFF << (start & 7)
    if not taken:
        match = _NOT_EMPTY.search(bitmap, byte + 1)
        if match is None:
            return start, 8 * len(bitmap)
        byte = match.start()
        taken = bitmap[byte]
    return start, byte * 8 + _lowest(taken)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1
