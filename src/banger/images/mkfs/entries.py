# SPDX-License-Identifier: MIT
"""The names in all directories, packed: one hash table for look-ups, one list for each directory.

About 50 bytes a name. Used by `mkfs` only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Final

_NONE: Final = 0
_REMOVED: Final = 1
"""No entry: its place in the hash table is to be passed over."""
_FIRST: Final = 2
_START_SLOTS: Final = 1 << 10
_COMPACT_BYTES: Final = 1 << 20
_ARRAYS: Final = 5
"""Numbers of four bytes that are kept of each entry."""


class Entries:
    """Entries by number; 0 stands for none. The first entry of a directory is kept by the caller."""

    def __init__(self) -> None:
        self._directory = array("I", bytes(4 * _FIRST))
        self._inode = array("I", bytes(4 * _FIRST))
        self._after = array("I", bytes(4 * _FIRST))
        self._before = array("I", bytes(4 * _FIRST))
        self._name_at = array("I", bytes(4 * _FIRST))
        self._names = bytearray(1)
        self._lost = 0
        self._free = _NONE
        self._slots = array("I", bytes(4 * _START_SLOTS))
        self._filled = 0
        self.used = 0

    @property
    def packed_bytes(self) -> int:
        """What all this takes of memory."""
        return 4 * (_ARRAYS * len(self._inode) + len(self._slots)) + len(self._names)

    def find(self, directory: int, name: bytes) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        at = hash((directory, name)) & mask
        while entry := slots[at]:
            if self._directory[entry] == directory and self.name(entry) == name:
                return entry
            at = (at + 1) & mask
        return _NONE

    def add(self, directory: int, name: bytes, inode: int, first: int) -> int:
        """A name that is not there yet, in front of the directory's first one."""
        if (self._filled + 1) * 5 > len(self._slots) * 3:
            self._rebuild()
        entry = self._new(directory, name, inode)
        self._after[entry] = first
        self._before[entry] = _NONE
        if first:
            self._before[first] = entry
        self._insert(entry, name)
        self.used += 1
        return entry

    def remove(self, entry: int, first: int) -> int:
        """Forgets a name; gives the directory's first entry after that."""
        name = self.name(entry)
        self._slots[self._slot_of(entry, name)] = _REMOVED
        before, after = self._before[entry], self._after[entry]
        if before:
            self._after[before] = after
        if after:
            self._before[after] = before
        self._lost += 1 + len(name)
        self._directory[entry] = self._inode[entry] = 0
        self._after[entry] = self._free
        self._free = entry
        self.used -= 1
        if self._lost > max(_COMPACT_BYTES, len(self._names) // 2):
            self._compact()
        return after if entry == first else first

    def name(self, entry: int) -> bytes:
        at = self._name_at[entry]
        return bytes(self._names[at + 1 : at + 1 + self._names[at]])

    def inode(self, entry: int) -> int:
        return self._inode[entry]

    def listed(self, first: int) -> array[int]:
        """A directory's entries, in the order in which they were added."""
        found = array("I")
        while first:
            found.append(first)
            first = self._after[first]
        found.reverse()
        return found

    def _new(self, directory: int, name: bytes, inode: int) -> int:
        entry = self._free
        if entry:
            self._free = self._after[entry]
            self._directory[entry], self._inode[entry] = directory, inode
            self._name_at[entry] = len(self._names)
        else:
            entry = len(self._directory)
            self._directory.append(directory)
            self._inode.append(inode)
            self._after.append(_NONE)
            self._before.append(_NONE)
            self._name_at.append(len(self._names))
        self._names.append(len(name))
        self._names += name
        return entry

    def _insert(self, entry: int, name: bytes) -> None:
        slots, mask = self._slots, len(self._slots) - 1
        at = hash((self._directory[entry], name)) & mask
        while slots[at] > _REMOVED:
            at = (at + 1) & mask
        self._filled += slots[at] == _NONE
        slots[at] = entry

    def _slot_of(self, entry: int, name: bytes) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        at = hash((self._directory[entry], name)) & mask
        while slots[at] != entry:
            at = (at + 1) & mask
        return at

    def _rebuild(self) -> None:
        """A hash table with room to grow, and without the removed ones."""
        size = len(self._slots)
        while size < (self.used + 1) * 3:
            size *= 2
        self._slots = array("I")  # the old one goes first
        self._slots = array("I", [0]) * size
        self._filled = 0
        for entry in self._living():
            self._insert(entry, self.name(entry))

    def _compact(self) -> None:
        names = bytearray(1)
        for entry in self._living():
            name = self.name(entry)
            self._name_at[entry] = len(names)
            names.append(len(name))
            names += name
        self._names = names
        self._lost = 0

    def _living(self) -> Iterator[int]:
        return (entry for entry, inode in enumerate(self._inode) if inode)
