# SPDX-License-Identifier: MIT
"""Small edits of an image while it is still being made: remove, write, link. Root owns what they bring.

Used by recipes and by `assemble`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from typing import Final

from banger import run
from banger.images import paths
from banger.images.mkfs import filesystem

_LINK: Final = stat.S_IFLNK | 0o777


class Edits:
    """Paths are absolute and plain; directories on the way are made, and followed where they are links."""

    def __init__(self, fs: filesystem.Filesystem) -> None:
        self._fs = fs
        self._paths = paths.Paths(fs)
        self._now_ns = time.time_ns()

    def remove(self, pattern: str) -> None:
        """What matches: `*` stands for any part of one name. Links are not followed; nothing is fine."""
        for directory, name in self._matches(paths.split(os.fsencode(pattern))):
            self._fs.remove(directory, name)
            self._paths.forget()

    def mkdir(self, path: str, attributes: filesystem.Attributes = paths.IMPLIED) -> int:
        """A new directory in place of whatever was there."""
        directory, name = self._clear(path)
        return self._fs.mkdir(directory, name, attributes)

    def write(self, path: str, content: Iterable[bytes], *, permissions: int = 0o644) -> None:
        """A new regular file in place of whatever was there."""
        directory, name = self._clear(path)
        attributes = filesystem.Attributes(stat.S_IFREG | permissions, mtime_ns=self._now_ns)
        self._fs.write(directory, name, attributes, content)

    def symlink(self, path: str, target: str) -> None:
        directory, name = self._clear(path)
        attributes = filesystem.Attributes(_LINK, mtime_ns=self._now_ns)
        self._fs.symlink(directory, name, attributes, os.fsencode(target))

    def _clear(self, path: str) -> tuple[int, bytes]:
        *parents, name = paths.split(os.fsencode(path))
        directory = self._paths.make_directory(b"/".join(parents))[-1]
        if self._fs.lookup(directory, name) is not None:
            self._fs.remove(directory, name)
            self._paths.forget()
        return directory, name

    def _matches(self, parts: list[bytes]) -> list[tuple[int, bytes]]:
        directories = [self._fs.ROOT]
        for part in parts[:-1]:
            found = [below for directory in directories for _, below in self._matching(directory, part)]
            directories = [each for each in found if self._paths.is_directory(each)]
        last = parts[-1:]
        return [
            (directory, name)
            for directory in directories
            for part in last
            for name, _ in self._matching(directory, part)
        ]

    def _matching(self, directory: int, part: bytes) -> list[tuple[bytes, int]]:
        if b"*" not in part:
            found = self._fs.lookup(directory, part)
            return [] if found is None else [(part, found)]
        pieces = part.split(b"*")
        found_all: list[tuple[bytes, int]] = []
        for child in self._fs.children(directory):
            run.check_cancelled()
            if _is_like(child[0], pieces):
                found_all.append(child)
        return found_all


def _is_like(name: bytes, pieces: list[bytes]) -> bool:
    """Whether a name is these pieces with anything between them.

    The first place for each piece is as good as any other: a name is gone through once. A regular expression
    would try them all, and hold up every thread meanwhile.
    """
    first, *middle, last = pieces
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for piece in middle:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True
