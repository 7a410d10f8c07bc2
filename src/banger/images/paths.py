# SPDX-License-Identifier: MIT
"""Paths inside an image, followed as the guest would follow them, and never out of it.

An archive's names go through links that lower layers made: `lib/x` lands in `/usr/lib` where `/lib` is a
link. Absolute targets start at the image's root. Used by `flatten`, `edit` and `assemble`.
"""

from __future__ import annotations

import stat
from typing import Final

from banger.contract import errors
from banger.images.mkfs import filesystem

MAX_DEPTH: Final = 256
"""Directories above a file. The deepest trees of real images have a few dozen."""
IMPLIED: Final = filesystem.Attributes(stat.S_IFDIR | 0o755)
"""A directory that is needed and that nobody describes."""
_MAX_NAME: Final = 255
_MAX_LINKS: Final = 40
_MAX_KNOWN: Final = 4096

Chain = tuple[int, ...]
"""Inodes of the directories from the root to one, both included."""


class BlockedError(errors.BadRequestError):
    """What should be a directory on the way is something else."""


class _Missing(Exception):
    """Something on the way is not there."""


class Paths:
    """Remembers where directories are: an archive names the same one many times in a row."""

    def __init__(self, fs: filesystem.Filesystem) -> None:
        self._fs = fs
        self._known: dict[bytes, Chain] = {}

    def forget(self) -> None:
        """For whoever removes a directory or a link."""
        self._known.clear()

    def find_directory(self, path: bytes) -> Chain | None:
        """Where a path leads that must be a directory; None when something on the way is missing."""
        try:
            return self._known.get(path) or self._remember(path, self._walk(split(path), make=False))
        except _Missing:
            return None

    def make_directory(self, path: bytes) -> Chain:
        """The same, with what is missing made."""
        return self._known.get(path) or self._remember(path, self._walk(split(path), make=True))

    def find(self, path: bytes) -> int | None:
        """The inode of anything, links followed; None where nothing is, or nothing can be."""
        try:
            return self._walk(split(path), make=False, ends_with_any=True)[-1]
        except (_Missing, errors.BadRequestError):
            return None

    def is_directory(self, inode: int) -> bool:
        return stat.S_ISDIR(self._fs.attributes(inode).mode)

    def _remember(self, path: bytes, found: Chain) -> Chain:
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[path] = found
        return found

    def _walk(self, parts: list[bytes], *, make: bool, ends_with_any: bool = False) -> Chain:
        chain = [self._fs.ROOT]
        left = parts[::-1]
        links = 0
        while left:
            part = left.pop()
            if part == b"..":
                if len(chain) == 1:
                    raise errors.BadRequestError("it goes through a link that leads out of the image")
                chain.pop()
                continue
            found = self._fs.lookup(chain[-1], part)
            if found is None:
                if not make:
                    raise _Missing
                self._check_depth(chain)
                found = self._fs.mkdir(chain[-1], part, IMPLIED)
                chain.append(found)
                continue
            mode = self._fs.attributes(found).mode
            if stat.S_ISDIR(mode):
                self._check_depth(chain)
                chain.append(found)
            elif stat.S_ISLNK(mode):
                links += 1
                if links > _MAX_LINKS:
                    raise errors.BadRequestError("it goes through a loop of links")
                target = self._fs.readlink(found)
                if target.startswith(b"/"):
                    chain = [self._fs.ROOT]
                left += _parts(target)[::-1]
            elif ends_with_any and not left:
                chain.append(found)
            else:
                raise BlockedError(f"it goes through {part!r}, which is not a directory")
        return tuple(chain)

    def _check_depth(self, chain: list[int]) -> None:
        if len(chain) > MAX_DEPTH:
            raise errors.BadRequestError(f"it lies in more than {MAX_DEPTH} directories")


def split(path: bytes) -> list[bytes]:
    """The parts of a name in an archive or of a plain path; one that climbs is refused."""
    parts = _parts(path)
    for part in parts:
        if part == b"..":
            raise errors.BadRequestError("its name climbs out of a directory by '..'")
        if len(part) > _MAX_NAME:
            raise errors.BadRequestError(f"a part of its name is longer than {_MAX_NAME} bytes")
    return parts


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]
