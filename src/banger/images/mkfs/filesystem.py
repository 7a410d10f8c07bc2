# SPDX-License-Identifier: MIT
"""A new ext4 file system in a file: made entry by entry, whole once `finish` returns.

Directories and files are known by inode number; the root directory has number 2. Names are bytes. Nothing
replaces an existing name: who wants that removes it first. Used by `images` and `storage`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import stat
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from banger import run
from banger.contract import errors
from banger.images.mkfs import attributes as attributes_
from banger.images.mkfs import directory as directories
from banger.images.mkfs import entries, files, finish, inodes, layout, xattrs
from banger.images.mkfs.attributes import Attributes
from banger.images.mkfs.space import DiskTooSmallError
from banger.tarstream.hole import Hole

__all__ = ["Attributes", "DiskTooSmallError", "Filesystem", "Hole", "Limits"]

_MAX_NAME: Final = 255
_MAX_TARGET: Final = layout.BLOCK - 1
_LABEL_BYTES: Final = 16
_LOST_AND_FOUND: Final = b"lost+found"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """`max_bytes` bounds the blocks of the content, `max_inodes` the files and, separately, the names.

    `max_packed_bytes` bounds what is kept in memory of all of them: of the order of 100 bytes a file, and
    100 more for one with extended attributes.
    """

    max_bytes: int = 1 << 40
    max_inodes: int = 1_000_000
    max_packed_bytes: int = 80 << 20


class Filesystem:
    """Names, and what they name. Leaving the block without `finish` deletes the file."""

    ROOT: Final = layout.ROOT_INODE

    def __init__(self, path: Path, *, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._files = files.Files(path, limits.max_bytes // layout.BLOCK)
        self._entries = entries.Entries()
        self._finished = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.disk.close()
        if not self._finished:
            self._files.disk.path.unlink(missing_ok=True)

    @property
    def content_bytes(self) -> int:
        """What the content takes in blocks, extent trees and blocks of extended attributes included."""
        return self._files.space.used * layout.BLOCK

    @property
    def inode_count(self) -> int:
        """Files of any kind, the root directory not counted."""
        return self._files.inodes.used

    # --- looking ---

    def lookup(self, directory: int, name: bytes) -> int | None:
        """The inode of a name in a directory; None if there is none."""
        entry = self._entries.find(directory, name)
        return self._entries.inode(entry) if entry else None

    def children(self, directory: int) -> Iterator[tuple[bytes, int]]:
        """What was there when it was called, in the order in which it was added."""
        for entry in self._listed(directory):
            if self._entries.inode(entry):
                yield self._entries.name(entry), self._entries.inode(entry)

    def is_empty(self, directory: int) -> bool:
        """However many names a directory had, without looking at any."""
        return self._files.record(directory).size == 0

    def attributes(self, inode: int) -> Attributes:
        return self._files.attributes(inode)

    def size(self, inode: int) -> int:
        """Of a file or link in bytes; a directory has none yet."""
        record = self._files.record(inode)
        return 0 if stat.S_ISDIR(record.mode) else record.size

    def link_count(self, inode: int) -> int:
        return self._files.record(inode).links

    def read(self, inode: int, *, holes: bool = True) -> Iterator[bytes]:
        """The content of a regular file in pieces, with its holes as zeros or without them."""
        return self._files.read(inode, holes=holes)

    def segments(self, inode: int) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of what a regular file has between its holes, in order."""
        return self._files.segments(inode)

    def readlink(self, inode: int) -> bytes:
        return self._files.readlink(inode)

    # --- making ---

    def mkdir(self, directory: int, name: bytes, attributes: Attributes) -> int:
        self._check_new(directory, name, attributes, stat.S_IFDIR)
        number = self._files.add(attributes, where=directory, links=2)
        self._add_entry(directory, name, number)
        self._files.inodes.add_links(directory, 1)
        return number

    def write(
        self,
        directory: int,
        name: bytes,
        attributes: Attributes,
        content: Iterable[bytes | memoryview | Hole],
        *,
        size: int | None = None,
    ) -> int:
        """A regular file; with `size`, content of another length is refused.

        After content that failed, by itself or on its way, nothing can be finished any more.
        """
        self._check_new(directory, name, attributes, stat.S_IFREG)
        stored = self._files.store(content, size=size)
        number = self._files.add_stored(attributes, stored)
        self._add_entry(directory, name, number)
        return number

    def symlink(self, directory: int, name: bytes, attributes: Attributes, target: bytes) -> int:
        self._check_new(directory, name, attributes, stat.S_IFLNK)
        if not 0 < len(target) <= _MAX_TARGET or b"\0" in target:
            raise errors.BadRequestError(f"{_shown(name)} has a target that no symbolic link can have")
        if len(target) < layout.FAST_SYMLINK_BYTES:
            slot = self._files.inodes.roots.add(target)
            number = self._files.add(attributes, kind=inodes.TARGET, where=slot, size=len(target))
        else:
            number = self._files.add_stored(attributes, self._files.store((target,)))
        self._add_entry(directory, name, number)
        return number

    def mknod(self, directory: int, name: bytes, attributes: Attributes) -> int:
        """A device node, fifo or socket."""
        kind = stat.S_IFMT(attributes.mode)
        if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            raise ValueError(f"mode {attributes.mode:o} is not that of a node")
        self._check_new(directory, name, attributes, kind)
        is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        number = self._files.add(
            attributes, where=inodes.join_device(*attributes.device) if is_device else 0
        )
        self._add_entry(directory, name, number)
        return number

    def link(self, directory: int, name: bytes, inode: int) -> None:
        """One more name for a file."""
        record = self._files.record(inode)
        if stat.S_ISDIR(record.mode):
            raise errors.BadRequestError(f"{_shown(name)} would be a second name of a directory")
        if record.links >= layout.MAX_LINKS:
            raise errors.BadRequestError(f"{_shown(name)} would be one name too many for its file")
        self._check_name(directory, name)
        self._add_entry(directory, name, inode)
        self._files.inodes.add_links(inode, 1)

    # --- changing ---

    def set_attributes(self, inode: int, attributes: Attributes) -> None:
        """Replaces all of them; the type cannot change."""
        self._files.set_attributes(inode, attributes)

    def remove(self, directory: int, name: bytes) -> None:
        """Removes a name, of a directory with all it holds. A file without names gives its blocks back."""
        entry = self._find(directory, name)
        inode = self._entries.inode(entry)
        if stat.S_ISDIR(self._files.inodes.mode(inode)):
            self._empty(inode)
        self._drop(directory, entry)

    # --- finishing ---

    def finish(
        self,
        *,
        size_bytes: int | None = None,
        headroom_bytes: int = 0,
        label: str = "",
        uuid: bytes | None = None,
    ) -> int:
        """Writes what is not content and gives the size.

        Without `size_bytes` the size is the smallest in whole MiB that leaves `headroom_bytes` free.
        """
        if self._files.broken:
            raise ValueError("a file system with half a file cannot be finished")
        uuid = uuid or _new_uuid()
        identity = layout.Identity(uuid, hashlib.sha256(uuid).digest()[:16], _label(label))
        if self.lookup(self.ROOT, _LOST_AND_FOUND) is None:
            self.mkdir(self.ROOT, _LOST_AND_FOUND, Attributes(stat.S_IFDIR | 0o700))
        self._write_directories(identity.hash_seed)
        if size_bytes is None:
            shape = finish.smallest(self._files, headroom_bytes)
        else:
            shape = layout.geometry(size_bytes, self._files.inodes.used)
        finish.Writer(self._files, shape).write(identity)
        final = size_bytes if size_bytes is not None else shape.blocks * layout.BLOCK
        self._files.disk.resize(final)
        self._finished = True
        return final

    # --- inside ---

    def _find(self, directory: int, name: bytes) -> int:
        entry = self._entries.find(directory, name)
        if not entry:
            raise errors.NotFoundError(f"there is no {_shown(name)} in directory {directory}")
        return entry

    def _listed(self, directory: int) -> array[int]:
        record = self._files.record(directory)
        if not stat.S_ISDIR(record.mode):
            raise errors.BadRequestError(f"inode {directory} is not a directory")
        return self._entries.listed(record.size)

    def _check_new(self, directory: int, name: bytes, wanted: Attributes, kind: int) -> None:
        if stat.S_IFMT(wanted.mode) != kind:
            raise ValueError(f"mode {wanted.mode:o} is of another type than what is made")
        attributes_.check(wanted)
        if wanted.xattrs:
            xattrs.encode(wanted.xattrs)  # refused before content is written
        if self._files.inodes.used >= self._limits.max_inodes:
            raise errors.BadRequestError(f"there are more than {self._limits.max_inodes} files")
        self._check_name(directory, name)

    def _check_name(self, directory: int, name: bytes) -> None:
        if not 0 < len(name) <= _MAX_NAME or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise errors.BadRequestError(f"{_shown(name)} cannot be the name of a file")
        if not stat.S_ISDIR(self._files.record(directory).mode):
            raise errors.BadRequestError(f"{_shown(name)} would lie in a file that is not a directory")
        if self._entries.find(directory, name):
            raise errors.AlreadyExistsError(f"{_shown(name)} is already there")
        if self._entries.used >= self._limits.max_inodes:
            raise errors.BadRequestError(f"there are more than {self._limits.max_inodes} names")
        if self._files.inodes.packed_bytes + self._entries.packed_bytes > self._limits.max_packed_bytes:
            raise errors.BadRequestError(
                f"names and attributes of {self._files.inodes.used} files take more than "
                f"{self._limits.max_packed_bytes >> 20} MiB of memory"
            )

    def _add_entry(self, directory: int, name: bytes, inode: int) -> None:
        record = self._files.inodes.get(directory)
        first = self._entries.add(directory, name, inode, record.size)
        self._files.inodes.put(directory, record._replace(size=first))

    def _empty(self, directory: int) -> None:
        """Removes what a directory holds, without recursion: archives nest as deep as they like."""
        waiting = [directory]
        seen = 0
        while seen < len(waiting):  # parents before their children
            for entry in self._listed(waiting[seen]):
                if stat.S_ISDIR(self._files.inodes.mode(self._entries.inode(entry))):
                    waiting.append(self._entries.inode(entry))
            seen += 1
        for each in reversed(waiting):
            for entry in self._listed(each):
                run.check_cancelled()
                self._drop(each, entry)

    def _drop(self, directory: int, entry: int) -> None:
        """Removes a name; of a directory only an empty one."""
        inode = self._entries.inode(entry)
        record = self._files.inodes.get(directory)
        first = self._entries.remove(entry, record.size)
        self._files.inodes.put(directory, record._replace(size=first))
        if stat.S_ISDIR(self._files.inodes.mode(inode)):
            self._files.inodes.add_links(directory, -1)
            self._files.release(inode)
        elif self._files.inodes.add_links(inode, -1) == 0:
            self._files.release(inode)

    def _write_directories(self, hash_seed: bytes) -> None:
        names = directories.Names(self._entries.name, self._target)
        for number in itertools.chain((self.ROOT,), range(layout.FIRST_INODE, self._files.inodes.last + 1)):
            if not stat.S_ISDIR(self._files.inodes.mode(number)):
                continue
            run.check_cancelled()
            record = self._files.inodes.get(number)
            listed = self._entries.listed(record.size)
            blocks = directories.blocks(number, record.where, listed, names, hash_seed)
            stored = self._files.store(blocks)
            only = stored.tree.only_run()
            kind, where = (inodes.RUN, only[0]) if only else (inodes.ROOT, 0)
            if not only:
                where = self._files.inodes.roots.add(stored.tree.root())
            written = record._replace(layout=kind, size=stored.size, where=where, blocks=stored.tree.blocks)
            self._files.inodes.put(number, written)

    def _target(self, entry: int) -> tuple[int, int]:
        inode = self._entries.inode(entry)
        return inode, attributes_.FILE_TYPES[stat.S_IFMT(self._files.inodes.mode(inode))]


def _shown(name: bytes) -> str:
    return repr(os.fsdecode(name[:_MAX_NAME]))


def _label(text: str) -> bytes:
    label = text.encode()
    if len(label) > _LABEL_BYTES:
        raise errors.BadRequestError(f"the label {text!r} is longer than {_LABEL_BYTES} bytes")
    return label


def _new_uuid() -> bytes:
    value = bytearray(os.urandom(16))
    value[6] = value[6] & 0x0F | 0x40  # version 4
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)
