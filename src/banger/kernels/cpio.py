# SPDX-License-Identifier: MIT
"""Writes the archive that the kernel unpacks as its first root file system ("newc" cpio).

Reproducible: root owns everything, no times. Used by the initrd builder.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Iterable
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_MAX_FILE_BYTES: Final = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory, link or device. `path` is relative, without a leading slash."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @classmethod
    def directory(cls, path: str, permissions: int = 0o755) -> Entry:
        return cls(path, stat.S_IFDIR | permissions)

    @classmethod
    def file(cls, path: str, data: bytes, permissions: int = 0o644) -> Entry:
        return cls(path, stat.S_IFREG | permissions, data)

    @classmethod
    def symlink(cls, path: str, target: str) -> Entry:
        return cls(path, stat.S_IFLNK | 0o777, target.encode())

    @classmethod
    def character_device(cls, path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
        return cls(path, stat.S_IFCHR | permissions, b"", (major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive; parents must come before what they hold."""
    out = bytearray()
    for inode, entry in enumerate(entries, start=1):
        if not entry.path or entry.path.startswith("/") or "\0" in entry.path:
            raise ValueError(f"not a path for an archive: {entry.path!r}")
        _append(out, inode, entry)
    _append(out, 0, Entry(_TRAILER, 0))
    return bytes(out.ljust(-(-len(out) // 512) * 512, b"\0"))


def _append(out: bytearray, inode: int, entry: Entry) -> None:
    if len(entry.data) > _MAX_FILE_BYTES:
        raise ValueError(f"{entry.path} is too large for the archive format")
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    out += _MAGIC + b"".join(b"%08X" % number for number in numbers)
    out += name
    _pad(out)
    out += entry.data
    _pad(out)


def _pad(out: bytearray) -> None:
    out += bytes(-len(out) % 4)
