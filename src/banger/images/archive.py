# SPDX-License-Identifier: MIT
"""A tar that holds an image: its members by name, bounded; nothing is unpacked but what is asked for.

Used by `sources`. The members of a layer's tar are another matter: those are `flatten`'s.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Final

from banger import artefacts, run
from banger.contract import errors
from banger.images import bundle, decompress, manifest
from banger.tarstream import reader

_MAX_MEMBERS: Final = 50_000
_MAX_HEADER_BYTES: Final = 8 << 10
"""Two names of 4 KiB at the most stand in one. Python's own reader goes through it once for each byte of it
(CVE-2024-6232), and holds up all threads meanwhile.
"""
_MAX_LINKS: Final = 8
_CHUNK: Final = 1 << 20
_OTHER_PACKED: Final = {b"\xfd7zX": "xz", b"BZh": "bzip2"}
_HINT: Final = "copy or make it again; it should be a tar, plain or packed with gzip or zstd"


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    link: str = ""


class Archive:
    """The regular members of an uncompressed tar, and the links among them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._members = _index(path)

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def read(self, name: str, limit: int) -> bytes:
        """A small member, whole. Raises BadRequestError when it is missing or larger."""
        member = self._require(name)
        if member.size > limit:
            raise errors.BadRequestError(f"{name} in {self._path.name} is larger than {limit} bytes")
        with self._path.open("rb") as file:
            file.seek(member.offset)
            return file.read(min(member.size, limit))

    def identity(self, name: str) -> int:
        """The same for all names of one member."""
        return self._require(name).offset

    def extract(self, name: str, target: Path) -> None:
        """Copies a member out. Raises NoSpaceError before others on that disk have no room any more."""
        member = self._require(name)
        size = min(member.size, self._path.stat().st_size)
        artefacts.keep_room(target.parent, f"what {self._path.name} holds", size)
        with self._path.open("rb") as file, target.open("xb") as out:
            file.seek(member.offset)
            left = member.size
            while left and (piece := file.read(min(_CHUNK, left))):
                run.check_cancelled()
                out.write(piece)
                left -= len(piece)
        if left:
            raise errors.BadRequestError(f"{self._path.name} is cut short in {name}")

    def _require(self, name: str) -> _Member:
        found = self._found(name)
        if found is None:
            raise errors.BadRequestError(f"{self._path.name} has no {name}")
        return found

    def _found(self, name: str) -> _Member | None:
        """Follows links, as old writers use them for layers that several images share."""
        for _ in range(_MAX_LINKS):
            found = self._members.get(_plain(name))
            if found is None or not found.link:
                return found
            name = found.link
        return None


def first_name(path: Path) -> str:
    """The first member that is more than the top directory; says what kind of tar this is. Empty if none."""
    with path.open("rb") as file:
        head = file.read(4)
        _refuse_packed(path, head)
        file.seek(0)
        try:
            for entry in reader.entries(decompress.decompressed(file, manifest.compression(head))):
                if name := _plain(os.fsdecode(entry.name)):
                    return name
        except errors.BadRequestError as error:
            raise errors.BadRequestError(f"{path.name} is not a whole tar: {error}", hint=_HINT) from error
    return ""


def _refuse_packed(path: Path, head: bytes) -> None:
    for magic, program in _OTHER_PACKED.items():
        if head.startswith(magic):
            raise errors.BadRequestError(
                f"{path.name} is packed with {program}, which no image is",
                hint=f"unpack it first: `{program} -dk {path.name}`, and import what that leaves",
            )


def uncompressed(path: Path, scratch: Path, max_bytes: int) -> Path:
    """The tar itself, when it is not compressed; else a decompressed copy of it in `scratch`."""
    with path.open("rb") as file:
        kind = manifest.compression(file.read(4))
        if kind is bundle.Compression.NONE:
            return path
        file.seek(0)
        target = scratch / "archive.tar"
        left = max_bytes
        with target.open("xb") as out:
            for piece in decompress.decompressed(file, kind):
                run.check_cancelled()
                left -= len(piece)
                if left < 0:
                    raise errors.NoSpaceError(
                        f"{path.name} unpacks to more than there is room for in {scratch.parent}",
                        hint="free some space, or is it meant to be that large?",
                    )
                out.write(piece)
    return target


def _index(path: Path) -> dict[str, _Member]:
    found: dict[str, _Member] = {}
    reached, whole = 0, -(-path.stat().st_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with path.open("rb") as file, _damage(path):
        members = tarfile.open(fileobj=_Bounded(file), mode="r:")  # noqa: SIM115  # nothing to close: our file
        while member := members.next():
            members.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all
            run.check_cancelled()
            # tarfile believes a size below zero, and goes back by it: for ever (CVE-2025-8194).
            if member.size < 0 or not reached < members.offset <= whole:
                raise tarfile.ReadError("a size that cannot be")
            reached = members.offset
            if len(found) >= _MAX_MEMBERS:
                raise errors.BadRequestError(f"{path.name} has more than {_MAX_MEMBERS} members")
            name = _plain(member.name)
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
                found[name] = _Member(member.offset_data, member.size)
            elif member.issym():
                found[name] = _Member(0, 0, str(PurePosixPath(name).parent / member.linkname))
            elif member.islnk():
                found[name] = _Member(0, 0, member.linkname)
            elif not member.isdir():
                raise errors.BadRequestError(f"{path.name} holds {name}, which no image archive has")
    return found


def _plain(name: str) -> str:
    """Names only look members up here; one that points out of the archive finds nothing."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                return "\0"
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise errors.BadRequestError(f"{path.name} is not a whole tar: {error}", hint=_HINT) from error


class _Bounded(io.RawIOBase):
    """tarfile reads a header's extension whole, however long it says it is: here not that far."""

    def __init__(self, file: IO[bytes] | io.RawIOBase) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        return self._file.read(size) or b""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
