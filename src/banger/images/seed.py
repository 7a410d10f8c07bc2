# SPDX-License-Identifier: MIT
"""The work seed: what an image has in `/root`, as a tar, for the first content of each VM's work disk.

The work disk is mounted over `/root`: on the root disk nothing there would ever be seen. Used by `assemble`.
"""

from __future__ import annotations

import itertools
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final, cast

from banger import archive as archives
from banger import run
from banger.contract import errors, sizes
from banger.images.mkfs import filesystem
from banger.tarstream import header

_NS: Final = 1_000_000_000
_MAX_SEGMENTS: Final = 1 << 16
_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


def pack(fs: filesystem.Filesystem, directory: int, archive: Path, *, max_bytes: int) -> None:
    """Writes a directory of the file system into a new tar, itself as `.`, with all that its inodes say.

    Holes stay holes: a layer of a few bytes may stand for terabytes. Raises NoSpaceError before more than
    `max_bytes` are written.
    """
    first_names: dict[int, str] = {}
    with (
        archive.open("xb") as file,
        tarfile.open(
            fileobj=cast(IO[bytes], _Room(file, max_bytes)), mode="w", format=tarfile.PAX_FORMAT
        ) as out,
    ):
        for name, inode in _walk(fs, directory):
            if len(os.fsencode(name)) > header.MAX_NAME_BYTES:  # no VM could be made with it
                raise errors.BadRequestError(
                    f"/root has a path longer than {header.MAX_NAME_BYTES} bytes: {name[:100]}…",
                    hint="the image is damaged or hostile; nothing of it was kept",
                )
            member = _member(fs, inode, name)
            if inode in first_names:
                member.type, member.linkname, member.size = tarfile.LNKTYPE, first_names[inode], 0
            elif fs.link_count(inode) > 1 and not member.isdir():
                first_names[inode] = name
            content = _content(fs, inode, member) if member.isreg() else None
            if out.offset + member.size > max_bytes:  # said before a disk is filled with half of it
                raise _too_large(max_bytes)
            out.addfile(member, cast(IO[bytes], _Content(content)) if content is not None else None)


def _content(fs: filesystem.Filesystem, inode: int, member: tarfile.TarInfo) -> Iterator[bytes]:
    """What the archive holds of a file: of one with holes a map and what is between them, GNU's form 1.0."""
    segments = [*itertools.islice(fs.segments(inode), _MAX_SEGMENTS + 1)]
    stored = sum(length for _, length in segments)
    if stored == member.size or len(segments) > _MAX_SEGMENTS:
        return fs.read(inode)
    lines = "".join(f"{number}\n" for number in (len(segments), *itertools.chain(*segments))).encode()
    lines += bytes(-len(lines) % tarfile.BLOCKSIZE)
    said = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(member.size)}
    member.pax_headers = {**member.pax_headers, **said}
    member.size = len(lines) + stored
    return itertools.chain((lines,), fs.read(inode, holes=False))


def _walk(fs: filesystem.Filesystem, directory: int) -> Iterator[tuple[str, int]]:
    """Parents before what they hold."""
    waiting = [(".", directory)]
    while waiting:
        name, inode = waiting.pop()
        yield name, inode
        if stat.S_ISDIR(fs.attributes(inode).mode):
            prefix = "" if name == "." else f"{name}/"
            waiting += [(prefix + os.fsdecode(child), below) for child, below in fs.children(inode)]


def _member(fs: filesystem.Filesystem, inode: int, name: str) -> tarfile.TarInfo:
    about = fs.attributes(inode)
    member = tarfile.TarInfo(name)
    member.type = _TYPES[stat.S_IFMT(about.mode)]
    member.mode = stat.S_IMODE(about.mode)
    member.uid, member.gid = about.uid, about.gid
    member.devmajor, member.devminor = about.device
    member.mtime = about.mtime_ns // _NS
    said: dict[str, str] = {
        _Key(f"SCHILY.xattr.{os.fsdecode(key)}"): os.fsdecode(value) for key, value in about.xattrs
    }
    if about.mtime_ns % _NS or about.mtime_ns < 0:
        said["mtime"] = archives.decimal(about.mtime_ns)
    member.pax_headers = said
    if member.isreg():
        member.size = fs.size(inode)
    elif member.issym():
        member.linkname = os.fsdecode(fs.readlink(inode))
    return member


class _Key(str):
    """A pax header's: an attribute's name may be any bytes, which tarfile takes back of values alone."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> bytes:
        return super().encode(encoding, errors)


def _too_large(max_bytes: int) -> errors.NoSpaceError:
    room = sizes.text_of_bytes(max(max_bytes, 0))
    return errors.NoSpaceError(
        f"what the image has in /root does not fit into the {room} that may be used here",
        hint="free some space, or is it meant to be that large?",
    )


class _Room:
    """As much of a file as tarfile asks of one: to be written, as far as there is room, until cancelled."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: bytes) -> int:
        run.check_cancelled()
        if self._file.tell() + len(data) > self._max_bytes:
            raise _too_large(self._max_bytes)
        return self._file.write(data)


class _Content:
    """As much of a file as tarfile asks of one: to be read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        found, self._rest = self._rest[:size], self._rest[size:]
        return found
