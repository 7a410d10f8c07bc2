# SPDX-License-Identifier: MIT
"""The header block of a tar member: its fields, checked. Used by `tarstream` only."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from typing import Final

import msgspec

from banger.contract import errors

BLOCK: Final = 512
MAX_NAME_BYTES: Final = 4096
MAX_SIZE_BYTES: Final = 1 << 44
"""16 TiB: what a file in an ext4 can have."""
NS: Final = 1_000_000_000

REGULAR: Final = (b"0", b"\0", b"7")
HARD_LINK: Final = b"1"
GNU_SPARSE: Final = b"S"
LONG_NAME: Final = b"L"
LONG_TARGET: Final = b"K"
PAX: Final = b"x"
PAX_GLOBAL: Final = b"g"
TYPES: Final = {
    **dict.fromkeys((*REGULAR, GNU_SPARSE, HARD_LINK), stat.S_IFREG),
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
"""Members, by their type flag; the flags above that are not here announce something about the next one."""

_FIELDS: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_USTAR: Final = b"ustar\0"
_MAGICS: Final = (_USTAR, b"ustar ", bytes(6))
_BLANK_CHECKSUM: Final = 8 * 0x20
_ADLER_PRIME: Final = 65521
_ZERO_BLOCK: Final = bytes(BLOCK)
_SIGN_BITS: Final = bytes(byte & 0x80 for byte in range(256))


class Header(msgspec.Struct, frozen=True, gc=False):
    """`block` is the whole of it, of a sparse file only."""

    flag: bytes
    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes
    device: tuple[int, int]
    block: bytes


def parse(buffer: bytes, at: int) -> Header | None:
    """The header in a buffer; None for a block of zeros, which ends an archive."""
    (name, mode, uid, gid, size, mtime, checksum, flag, target, magic, major, minor, prefix) = (
        _FIELDS.unpack_from(buffer, at)
    )
    block = memoryview(buffer)[at : at + BLOCK]
    try:
        if not _is_sum(block, checksum, number(checksum)):
            if block == _ZERO_BLOCK:
                return None
            raise damaged("a header's checksum is wrong: this is no tar, or a damaged one")
        if magic[:6] not in _MAGICS:
            raise damaged("a header is of an unknown format")
        name = until_nul(name)
        if prefix[0] and magic[:6] == _USTAR:
            name = until_nul(prefix) + b"/" + name
        return Header(
            flag,
            name,
            number(mode) & 0o7777,
            number(uid),
            number(gid),
            number(size),
            number(mtime) * NS,
            until_nul(target),
            (number(major), number(minor)) if flag in (b"3", b"4") else (0, 0),
            bytes(block) if flag == GNU_SPARSE else b"",
        )
    except ValueError as error:
        raise damaged(f"a header has a field that is no number: {error}") from error


def number(field: bytes) -> int:
    """A number in octal digits, or in GNU's base 256; raises ValueError."""
    digits = field.strip(b" \0")
    if digits.isdigit():
        return int(digits, 8)
    if not digits:
        return 0
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & (1 << 8 * len(field) - 1) - 1
        return value - (1 << 8 * len(field) - 1) if field[0] & 0x40 else value
    raise ValueError(repr(field))


def until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def shown(name: bytes) -> str:
    return repr(os.fsdecode(name[:200]))


def damaged(reason: str) -> errors.BadRequestError:
    return errors.BadRequestError(reason, hint="make or fetch the archive again")


def _is_sum(block: memoryview, field: bytes, stated: int) -> bool:
    """Whether it is the sum of the header's bytes, its own read as blanks; old tars sum signed bytes.

    An Adler checksum has the sum of all bytes in its lower half, plus 1 and modulo a prime.
    """
    found = (zlib.adler32(block) & 0xFFFF) - 1 - sum(field) + _BLANK_CHECKSUM
    if not (found - stated) % _ADLER_PRIME:
        return True
    signs = sum(block.tobytes().translate(_SIGN_BITS)) - sum(field.translate(_SIGN_BITS))
    return bool(signs) and not (found - 2 * signs - stated) % _ADLER_PRIME
