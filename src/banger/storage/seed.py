# SPDX-License-Identifier: MIT
"""Unpacks a work seed, a tar of what `/root` shall hold, straight into a file system that is being made.

Nothing of it ever touches the host's own files. Used by `workdisk`.
"""

from __future__ import annotations

import decimal
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final

from banger import run
from banger.contract import errors
from banger.images.mkfs.filesystem import Attributes, Filesystem

_CHUNK: Final = 1 << 20
_XATTR_PREFIX: Final = "SCHILY.xattr."
_DIRECTORY: Final = Attributes(stat.S_IFDIR | 0o755)
_KINDS: Final = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def unpack(made: Filesystem, seed: Path) -> None:
    """Fills a new file system; a seed that is damaged or cut short is refused."""
    with seed.open("rb") as stream:
        _check_end(stream)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for member in archive:
                    run.check_cancelled()
                    _add(made, archive, member)
                    vars(archive)["members"].clear()  # or tarfile keeps them all
        except tarfile.TarError as error:
            raise errors.BadRequestError(f"the work seed is damaged: {error}") from error


def _check_end(stream: IO[bytes]) -> None:
    """tarfile takes a seed that is cut between two members for a shorter one."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - tarfile.BLOCKSIZE))
    if stream.read() != bytes(tarfile.BLOCKSIZE):
        raise errors.BadRequestError("the work seed is cut short", hint="build or pull its image again")
    stream.seek(0)


def _add(made: Filesystem, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    parts = _parts(member.name)
    kind = stat.S_IFREG if member.isreg() else _KINDS.get(member.type)
    if not parts:
        if kind == stat.S_IFDIR:
            made.set_attributes(made.ROOT, _attributes(member, kind))
        return
    directory = _directory(made, parts[:-1])
    name = parts[-1]
    found = made.lookup(directory, name)
    if kind == stat.S_IFDIR and found is not None and stat.S_ISDIR(made.attributes(found).mode):
        made.set_attributes(found, _attributes(member, kind))
        return
    target = _target(made, member) if member.islnk() else None
    if found is not None and found != target:
        made.remove(directory, name)
    if target is not None:
        if found != target:
            made.link(directory, name, target)
    elif kind == stat.S_IFREG:
        content = archive.extractfile(member)
        pieces = _pieces(content) if content is not None else iter(())
        made.write(directory, name, _attributes(member, kind), pieces, size=member.size)
    elif kind == stat.S_IFDIR:
        made.mkdir(directory, name, _attributes(member, kind))
    elif kind == stat.S_IFLNK:
        made.symlink(directory, name, _attributes(member, kind), os.fsencode(member.linkname))
    elif kind is not None:
        made.mknod(directory, name, _attributes(member, kind))
    else:
        raise errors.BadRequestError(f"{member.name}: a tar member of unknown type {member.type!r}")


def _parts(name: str) -> list[bytes]:
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    if ".." in parts:
        raise errors.BadRequestError(f"{name}: a tar member would leave the tree")
    return [os.fsencode(part) for part in parts]


def _directory(made: Filesystem, parts: list[bytes]) -> int:
    """The directory at a path, made where it is missing; a link on the way is no directory."""
    here = made.ROOT
    for part in parts:
        found = made.lookup(here, part)
        here = found if found is not None else made.mkdir(here, part, _DIRECTORY)
    return here


def _target(made: Filesystem, member: tarfile.TarInfo) -> int:
    here: int | None = made.ROOT
    for part in _parts(member.linkname):
        here = made.lookup(here, part) if here is not None else None
    if here is None:
        raise errors.BadRequestError(f"{member.name} is a link to {member.linkname}, which is not there")
    return here


def _attributes(member: tarfile.TarInfo, kind: int) -> Attributes:
    return Attributes(
        mode=kind | (0o777 if kind == stat.S_IFLNK else member.mode & 0o7777),
        uid=member.uid,
        gid=member.gid,
        mtime_ns=int(decimal.Decimal(member.pax_headers.get("mtime", str(member.mtime))).scaleb(9)),
        device=(member.devmajor, member.devminor) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
        xattrs=tuple(
            (os.fsencode(name.removeprefix(_XATTR_PREFIX)), os.fsencode(value))
            for name, value in member.pax_headers.items()
            if name.startswith(_XATTR_PREFIX)
        ),
    )


def _pieces(content: IO[bytes]) -> Iterator[bytes]:
    while piece := content.read(_CHUNK):
        yield piece
