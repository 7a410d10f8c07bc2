# SPDX-License-Identifier: MIT
"""What an inode says of itself, and how its times and device numbers read on disk."""

from __future__ import annotations

import dataclasses
import stat
from typing import Final

from banger.contract import errors

_NS: Final = 1_000_000_000
_EARLIEST_S: Final = -(1 << 31)
# The format reaches to 2446, but e2fsck takes what lies beyond 2310 for a mistake of old kernels.
_LATEST_S: Final = (3 << 32) - (1 << 31) - 1
_MAX_ID: Final = (1 << 32) - 1
_MAX_MAJOR: Final = (1 << 12) - 1
_MAX_MINOR: Final = (1 << 20) - 1
FILE_TYPES: Final = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}
"""Type bits of a mode to the type in a directory entry."""


@dataclasses.dataclass(frozen=True, slots=True)
class Attributes:
    """`mode` has its type bits; `device` is for device nodes; xattrs have their full names.

    An ACL is given and returned as system calls and archives have it, whatever ext4 makes of it.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


def check(wanted: Attributes) -> None:
    """Refuses what an inode cannot hold."""
    if stat.S_IFMT(wanted.mode) not in FILE_TYPES or wanted.mode >> 16:
        raise ValueError(f"mode {wanted.mode:o} is not that of a file")
    if not (0 <= wanted.uid <= _MAX_ID and 0 <= wanted.gid <= _MAX_ID):
        raise errors.BadRequestError(f"owner {wanted.uid}:{wanted.gid} does not fit into 32 bits")
    if wanted.device != (0, 0):
        major, minor = wanted.device
        if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
            raise errors.BadRequestError(f"device number {major}:{minor} is not one of Linux")


def encode_time(ns: int) -> tuple[int, int]:
    """The low 32 bits of the seconds, and the extra field: 2 more bits, then the nanoseconds.

    A time before 1901 or after April 2310 becomes the nearest that can be held.
    """
    seconds, rest = divmod(ns, _NS)
    if seconds < _EARLIEST_S:
        seconds, rest = _EARLIEST_S, 0
    elif seconds > _LATEST_S:
        seconds, rest = _LATEST_S, _NS - 1
    low = seconds & 0xFFFFFFFF
    signed = low - ((low & 0x80000000) << 1)
    return low, (seconds - signed) >> 32 & 3 | rest << 2


def decode_time(low: int, extra: int) -> int:
    seconds = low - ((low & 0x80000000) << 1) + ((extra & 3) << 32)
    return seconds * _NS + (extra >> 2)


def encode_device(major: int, minor: int) -> tuple[int, int]:
    """The first two words of an inode's block map: one for small numbers, the other for large ones."""
    if major < 256 and minor < 256:
        return major << 8 | minor, 0
    return 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
