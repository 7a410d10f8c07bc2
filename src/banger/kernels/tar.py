# SPDX-License-Identifier: MIT
"""Reads a package's tar once, front to back, with bounds: members, sizes and the memory that headers take.

The standard library's reader takes a header's word for how much to read into memory. A package's tar has few
forms (ustar, GNU long names, pax paths), so this one knows no more. Used by `deb`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import IO, Final

from banger import run
from banger.contract import errors

MAX_MEMBERS: Final = 200_000
MAX_HEADER_BYTES: Final = 1 << 20
_BLOCK: Final = 512
_CHUNK: Final = 1 << 20
_PAX_LINE = re.compile(rb"^\d+ (path|size)=(.*)$", re.MULTILINE)


@dataclasses.dataclass(slots=True)
class Member:
    """A regular file. Its content can be read until the next one is asked for."""

    name: str
    size: int
    _file: IO[bytes]
    _left: int = -1

    def pieces(self) -> Iterator[bytes]:
        self._left = self.size if self._left < 0 else self._left
        while self._left:
            run.check_cancelled()
            piece = _exactly(self._file, min(_CHUNK, self._left))
            self._left -= len(piece)
            yield piece

    def finish(self) -> None:
        for _ in self.pieces():
            pass
        _exactly(self._file, -self.size % _BLOCK)


def files(file: IO[bytes]) -> Iterator[Member]:
    """The regular files; other members are passed over. Raises BadRequestError for what is no whole tar."""
    name, size = "", -1
    for _ in range(MAX_MEMBERS):
        header = _exactly(file, _BLOCK)
        if not header.strip(b"\0"):
            return
        _check_sum(header)
        kind, length = header[156:157], _number(header[124:136])
        if kind in (b"L", b"K", b"x", b"g"):
            content = _header_content(file, length)
            if kind == b"L":
                name = content.rstrip(b"\0").decode(errors="replace")
            elif kind == b"x":
                name, size = _pax(content, name, size)
            continue
        regular = kind in (b"0", b"\0")
        member = Member(name or _name(header), size if size >= 0 else length, file)
        # Links, devices and directories have no content, whatever their size says.
        if regular:
            yield member
            member.finish()
        name, size = "", -1
    raise errors.BadRequestError(f"the archive has more than {MAX_MEMBERS} members")


def _header_content(file: IO[bytes], length: int) -> bytes:
    if length > MAX_HEADER_BYTES:
        raise errors.BadRequestError("the archive has a header larger than 1 MiB")
    content = _exactly(file, length)
    _exactly(file, -length % _BLOCK)
    return content


def _pax(content: bytes, name: str, size: int) -> tuple[str, int]:
    for key, value in _PAX_LINE.findall(content):
        if key == b"path":
            name = value.decode(errors="replace")
        elif value.isdigit() and len(value) < 16:
            size = int(value)
        else:
            raise errors.BadRequestError("the archive has a size that is no number")
    return name, size


def _name(header: bytes) -> str:
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    name = header[:100].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 when the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b"\0 ")
    if not re.fullmatch(rb"[0-7]*", text):
        raise errors.BadRequestError("the archive has a size that is no number")
    return int(text or b"0", 8)


def _check_sum(header: bytes) -> None:
    said = header[148:156].strip(b"\0 ")
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not re.fullmatch(rb"[0-7]+", said) or int(said, 8) != found:
        raise errors.BadRequestError("the archive is damaged: a header's check sum is wrong")


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise errors.BadRequestError("the archive is cut short")
    return data
