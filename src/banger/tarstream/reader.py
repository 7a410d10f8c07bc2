# SPDX-License-Identifier: MIT
"""The members of a tar, one after the other, while it streams by. Used for layers, seeds and packages."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from banger import run
from banger.tarstream import header, hole, pax, sparse
from banger.tarstream.header import BLOCK, damaged, shown

Content = Iterable[bytes | memoryview | hole.Hole]
_MAX_ID: Final = (1 << 32) - 1


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One member. `mode` has its type bits; of a hard link only name and target count.

    `content` can be taken once, before the next entry is asked for; what is left of it then is skipped.
    """

    name: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    target: bytes
    hard_link: bool
    device: tuple[int, int]
    xattrs: tuple[tuple[bytes, bytes], ...]
    size: int
    content: Content


def entries(pieces: Iterator[bytes], *, end_is_known: bool = False) -> Iterator[Entry]:
    """All members, to the last byte of the stream.

    A tar that stops without an end mark is refused as cut, unless `end_is_known`: who gives the pieces
    knows whether they are all.
    """
    return _Reader(pieces).entries(end_is_known)


class _Reader:
    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._piece = b""
        self._at = 0
        self._left = 0
        """What the stream still has of the current member, its filling included."""
        self._ends_with_mark = False

    def entries(self, end_is_known: bool) -> Iterator[Entry]:
        common = said = pax.NOTHING
        long_name = long_target = b""
        while (head := self._header()) is not None:
            flag = head.flag
            if flag in header.TYPES:
                yield self._entry(head, said, long_name, long_target)
                self._skip()
                said, long_name, long_target = common, b"", b""
            elif flag == header.PAX:
                if said is not common:
                    raise damaged("two pax headers describe one member")
                said = pax.parse(self._body(head, pax.MAX_BYTES), common)
            elif flag == header.PAX_GLOBAL:
                if said is not common:
                    raise damaged("a pax header describes another header")
                said = common = pax.parse(self._body(head, pax.MAX_BYTES), common, is_global=True)
            elif flag == header.LONG_NAME and not long_name:
                long_name = self._long(head)
            elif flag == header.LONG_TARGET and not long_target:
                long_target = self._long(head)
            else:
                raise damaged(f"a member of the unknown or unexpected type {flag!r}")
        if said is not common or long_name or long_target:
            raise damaged("the archive ends where a member was announced")
        self._check_end(end_is_known)

    def _header(self) -> header.Header | None:
        if len(self._piece) - self._at >= BLOCK:
            self._at += BLOCK
            found = header.parse(self._piece, self._at - BLOCK)
        elif self._at < len(self._piece) or self._more():
            found = header.parse(self._take(BLOCK), 0)
        else:
            return None
        self._ends_with_mark = found is None
        return found

    def _entry(self, head: header.Header, said: pax.Records, long_name: bytes, long_target: bytes) -> Entry:
        name = _one_of(said.path, long_name, head.name)
        kind = header.TYPES[head.flag]
        is_link = head.flag == header.HARD_LINK
        if head.flag == b"\0" and name.endswith(b"/"):
            kind = stat.S_IFDIR
        target = b""
        if is_link or kind == stat.S_IFLNK:
            target = _one_of(said.link_path, long_target, head.target)
        size = head.size if said.size is None else said.size
        if not 0 <= size <= header.MAX_SIZE_BYTES:
            raise damaged(f"{shown(name)} claims to have {size} bytes")
        if size and (is_link or kind != stat.S_IFREG):
            raise damaged(f"{shown(name)} has content, which its type cannot have")
        content: Content = ()
        self._left = size + -size % BLOCK
        if head.flag == header.GNU_SPARSE or said.sparse:
            name, size, content = self._sparse(head, said, name, size)
        elif size:
            content = self._stored(size)
        uid = head.uid if said.uid is None else said.uid
        gid = head.gid if said.gid is None else said.gid
        if not (0 <= uid <= _MAX_ID and 0 <= gid <= _MAX_ID):
            raise damaged(f"{shown(name)} belongs to {uid}:{gid}, which no owner is")
        mtime_ns = head.mtime_ns if said.mtime_ns is None else said.mtime_ns
        mode = kind | head.mode
        return Entry(
            name, mode, uid, gid, mtime_ns, target, is_link, head.device, said.xattrs, size, content
        )

    def _sparse(
        self, head: header.Header, said: pax.Records, name: bytes, stored: int
    ) -> tuple[bytes, int, Content]:
        """Name, real size and content."""
        if head.flag == header.GNU_SPARSE and not said.sparse:
            found, real_name = sparse.old_gnu(head.block, lambda: self._take(BLOCK)), b""
        elif head.flag in header.REGULAR:
            before = self._left
            found, real_name = sparse.from_pax(said.sparse, self._map_block)
            stored -= before - self._left
        else:
            raise damaged(f"{shown(name)} is sparse, which its type cannot be")
        found.check(stored)
        return _checked(real_name) if real_name else name, found.size, found.expand(self._stored)

    def _map_block(self) -> bytes:
        if self._left < BLOCK:
            raise damaged("a sparse file's map has no end")
        self._left -= BLOCK
        return self._take(BLOCK)

    def _long(self, head: header.Header) -> bytes:
        return _checked(header.until_nul(self._body(head, header.MAX_NAME_BYTES + 1)))

    def _body(self, head: header.Header, limit: int) -> bytes:
        if not 0 < head.size <= limit:
            raise damaged(f"a header about a member has {head.size} bytes, not 1 to {limit}")
        body = self._take(head.size)
        self._left = -head.size % BLOCK
        self._skip()
        return body

    # --- the stream ---

    def _stored(self, count: int) -> Iterator[memoryview]:
        """So many bytes of the current member, where they lie."""
        while count:
            here = min(len(self._piece) - self._at, count)
            if here:
                at = self._at
                self._at += here
                self._left -= here
                count -= here
                yield memoryview(self._piece)[at : at + here]
            else:
                self._need_more()

    def _take(self, count: int) -> bytes:
        found = self._piece[self._at : self._at + count]
        self._at += len(found)
        if len(found) == count:
            return found
        # Pieces may be as small as whoever sends them likes.
        whole = bytearray(found)
        while len(whole) < count:
            self._need_more()
            rest = self._piece[: count - len(whole)]
            self._at = len(rest)
            whole += rest
        return bytes(whole)

    def _skip(self) -> None:
        while self._left > len(self._piece) - self._at:
            self._left -= len(self._piece) - self._at
            self._need_more()
        self._at += self._left
        self._left = 0

    def _need_more(self) -> None:
        if not self._more():
            raise damaged("the archive is cut short")

    def _more(self) -> bool:
        run.check_cancelled()
        self._piece = next(self._pieces, b"")
        self._at = 0
        return bool(self._piece)

    def _check_end(self, end_is_known: bool) -> None:
        """Two blocks of zeros, then zeros only: whatever else came here, some readers would go on with."""
        zeros = 0
        while self._at < len(self._piece) or self._more():
            if self._piece[self._at :].strip(b"\0"):
                raise damaged("something follows the end of the archive")
            zeros += len(self._piece) - self._at
            self._at = len(self._piece)
        if not end_is_known and (not self._ends_with_mark or zeros < BLOCK):
            raise damaged("the archive is cut short")


def _one_of(said: bytes, long: bytes, short: bytes) -> bytes:
    if said and long and said != long:
        raise damaged(f"a member is called {shown(said)} and {shown(long)}")
    return _checked(said or long or short)


def _checked(name: bytes) -> bytes:
    if not 0 < len(name) <= header.MAX_NAME_BYTES or b"\0" in name:
        raise damaged(f"{shown(name)} is no name: empty, too long, or with a zero byte in it")
    return name
