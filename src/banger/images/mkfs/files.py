# SPDX-License-Identifier: MIT
"""Files without their names: inodes, content, extended attributes, and what is given back of them.

Used by `mkfs` only.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from banger import run
from banger.contract import errors
from banger.images.mkfs import attributes as attributes_
from banger.images.mkfs import content as contents
from banger.images.mkfs import extents, inodes, layout, space, xattrs
from banger.images.mkfs.attributes import Attributes
from banger.images.mkfs.disk import Disk
from banger.tarstream.hole import Hole

_READ_BLOCKS: Final = 256


class Files:
    """Everything by inode number; who makes a file gives it a name, or it is lost."""

    def __init__(self, path: Path, max_blocks: int) -> None:
        self.disk = Disk(path)
        self.space = space.Space(max_blocks)
        self.inodes = inodes.Inodes()
        root = inodes.Record(stat.S_IFDIR | 0o755, inodes.EMPTY, 0, 0, 0, 0, 2, 0, 0, layout.ROOT_INODE, 0)
        self.inodes.put(layout.ROOT_INODE, root)
        self.broken = False
        """Whether content failed on its way: its blocks belong to no file."""
        self.freed = False
        """Whether blocks were ever given back, and so may hold what was in them."""

    def record(self, inode: int) -> inodes.Record:
        if inode != layout.ROOT_INODE and not layout.FIRST_INODE <= inode <= self.inodes.last:
            raise errors.NotFoundError(f"there is no inode {inode}")
        record = self.inodes.get(inode)
        if record.mode == 0:
            raise errors.NotFoundError(f"there is no inode {inode}")
        return record

    def attributes(self, inode: int) -> Attributes:
        record = self.record(inode)
        is_device = stat.S_IFMT(record.mode) in (stat.S_IFCHR, stat.S_IFBLK)
        return Attributes(
            mode=record.mode,
            uid=record.uid,
            gid=record.gid,
            mtime_ns=attributes_.decode_time(record.mtime, record.mtime_extra),
            device=inodes.split_device(record.where) if is_device else (0, 0),
            xattrs=self._xattrs(record.xattr),
        )

    def set_attributes(self, inode: int, attributes: Attributes) -> None:
        """Replaces all of them; the type cannot change."""
        record = self.record(inode)
        attributes_.check(attributes)
        if stat.S_IFMT(attributes.mode) != stat.S_IFMT(record.mode):
            raise ValueError(f"mode {attributes.mode:o} would change the type of inode {inode}")
        time, extra = attributes_.encode_time(attributes.mtime_ns)
        xattr = self._add_xattrs(attributes.xattrs)
        self._release_xattrs(record.xattr)
        where = record.where
        if stat.S_IFMT(record.mode) in (stat.S_IFCHR, stat.S_IFBLK):
            where = inodes.join_device(*attributes.device)
        changed = record._replace(
            mode=attributes.mode,
            uid=attributes.uid,
            gid=attributes.gid,
            mtime=time,
            mtime_extra=extra,
            xattr=xattr,
            where=where,
        )
        self.inodes.put(inode, changed)

    def read(self, inode: int, *, holes: bool) -> Iterator[bytes]:
        """The content of a regular file in pieces, with its holes as zeros or without them."""
        return self._read(self._regular(inode), holes=holes)

    def segments(self, inode: int) -> Iterator[tuple[int, int]]:
        """Offset and length in bytes of what a regular file has between its holes, in order."""
        record = self._regular(inode)
        start, end = 0, 0
        for logical, _, count in self._runs(record):
            at = logical * layout.BLOCK
            if at != end:
                if end > start:
                    yield start, end - start
                start = at
            end = min(at + count * layout.BLOCK, record.size)
        if end > start:
            yield start, end - start

    def _regular(self, inode: int) -> inodes.Record:
        record = self.record(inode)
        if not stat.S_ISREG(record.mode):
            raise errors.BadRequestError(f"inode {inode} is not a regular file")
        return record

    def readlink(self, inode: int) -> bytes:
        record = self.record(inode)
        if not stat.S_ISLNK(record.mode):
            raise errors.BadRequestError(f"inode {inode} is not a symbolic link")
        if record.layout == inodes.TARGET:
            return self.inodes.roots.get(record.where)[: record.size]
        return b"".join(self._read(record))

    def add(
        self,
        wanted: Attributes,
        *,
        kind: int = inodes.EMPTY,
        where: int = 0,
        size: int = 0,
        blocks: int = 0,
        links: int = 1,
    ) -> int:
        run.check_cancelled()
        time, extra = attributes_.encode_time(wanted.mtime_ns)
        xattr = self._add_xattrs(wanted.xattrs) if wanted.xattrs else 0
        return self.inodes.add(
            inodes.Record(
                *(wanted.mode, kind, wanted.uid, wanted.gid, time, extra),
                *(links, xattr, size, where, blocks),
            )
        )

    def store(
        self, content: Iterable[bytes | memoryview | Hole], *, size: int | None = None
    ) -> contents.Stored:
        """Writes content that is to be some inode's."""
        stored = contents.Stored(self.disk, self.space)
        self.broken = True
        stored.take(content, contents.MAX_BYTES if size is None else size)
        if size is not None and stored.size != size:
            raise errors.BadRequestError(f"a file of {size} bytes ended after {stored.size}")
        self.broken = False
        return stored

    def add_stored(self, wanted: Attributes, stored: contents.Stored) -> int:
        tree = stored.tree
        only = tree.only_run()
        if only is not None and only[1] == -(-stored.size // layout.BLOCK):
            return self.add(wanted, kind=inodes.RUN, where=only[0], size=stored.size, blocks=only[1])
        if tree.blocks == 0:
            return self.add(wanted, size=stored.size)
        slot = self.inodes.roots.add(tree.root())
        return self.add(wanted, kind=inodes.ROOT, where=slot, size=stored.size, blocks=tree.blocks)

    def release(self, inode: int) -> None:
        record = self.inodes.get(inode)
        if record.layout == inodes.RUN:
            self._free(record.where, record.blocks)
        elif record.layout == inodes.ROOT:
            root = self.inodes.roots.get(record.where)
            for block in [*extents.tree_blocks(root, self.disk.read)]:
                self._free(block, 1)
            for _, physical, count in self._runs(record):
                self._free(physical, count)
        if record.layout in (inodes.ROOT, inodes.TARGET):
            self.inodes.roots.release(record.where)
        self._release_xattrs(record.xattr)
        self.inodes.release(inode)

    def _runs(self, record: inodes.Record) -> Iterator[tuple[int, int, int]]:
        if record.layout == inodes.RUN:
            yield 0, record.where, record.blocks
        elif record.layout == inodes.ROOT:
            yield from extents.runs(self.inodes.roots.get(record.where), self.disk.read)

    def _read(self, record: inodes.Record, *, holes: bool = True) -> Iterator[bytes]:
        at = 0
        for logical, physical, count in self._runs(record):
            if holes:
                yield from _zeros(logical * layout.BLOCK - at)
            at = logical * layout.BLOCK
            for start in range(0, count, _READ_BLOCKS):
                data = self.disk.read(physical + start, min(_READ_BLOCKS, count - start))
                yield data[: record.size - at]
                at += len(data)
        if holes:
            yield from _zeros(record.size - at)

    def _xattrs(self, slot: int) -> tuple[tuple[bytes, bytes], ...]:
        if not slot:
            return ()
        body, block = self.inodes.xattrs(slot)
        return xattrs.decode(body, self.disk.read(block) if block else b"")

    def _add_xattrs(self, wanted: tuple[tuple[bytes, bytes], ...]) -> int:
        if not wanted:
            return 0
        body, outside = xattrs.encode(wanted)
        block = 0
        if outside:
            block, _ = self.space.allocate(1)
            self.disk.write(block, outside)
        return self.inodes.add_xattrs(body, block)

    def _release_xattrs(self, slot: int) -> None:
        if slot:
            _, block = self.inodes.xattrs(slot)
            self.inodes.bodies.release(slot)
            if block:
                self._free(block, 1)

    def _free(self, start: int, count: int) -> None:
        self.space.free(start, count)
        self.freed = True


def _zeros(count: int) -> Iterator[bytes]:
    step = _READ_BLOCKS * layout.BLOCK
    while count > 0:
        yield bytes(min(step, count))
        count -= step
