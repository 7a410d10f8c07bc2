# SPDX-License-Identifier: MIT
"""Tars made block by block, also such as no tool would write; and what an image says of itself."""

from __future__ import annotations

import gzip
import hashlib
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from banger.images import bundle, flatten
from banger.images.mkfs import filesystem
from banger.tarstream import reader

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
USTAR: Final = b"ustar\x0000"
GNU: Final = b"ustar  \0"


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def header(
    name: bytes,
    flag: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    target: bytes = b"",
    magic: bytes = USTAR,
    device: tuple[int | bytes, int | bytes] = (0, 0),
    prefix: bytes = b"",
    tail: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """One header block; a field given as bytes stands as it is, `tail` replaces all behind the devices."""

    def field(value: int | bytes, width: int) -> bytes:
        return (value if isinstance(value, bytes) else octal(value, width)).ljust(width, b"\0")

    block = bytearray(name[:100].ljust(100, b"\0"))
    block += field(mode, 8) + field(uid, 8) + field(gid, 8) + field(size, 12) + field(mtime, 12)
    block += b" " * 8 + flag + target[:100].ljust(100, b"\0") + magic.ljust(8, b"\0") + bytes(64)
    block += field(device[0], 8) + field(device[1], 8)
    block += (tail or prefix).ljust(167, b"\0")
    block[148:156] = b"%06o\0 " % (sum(block) if checksum is None else checksum)
    assert len(block) == BLOCK
    return bytes(block)


def file(name: bytes, content: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)  # type: ignore[arg-type]


def directory(name: bytes, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, b"5", mode=mode, **fields)  # type: ignore[arg-type]


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, b"2", target=target, mode=0o777)


def hard_link(name: bytes, target: bytes) -> bytes:
    return header(name, b"1", target=target)


def whiteout(name: bytes) -> bytes:
    head, slash, last = name.rpartition(b"/")
    return file(head + slash + b".wh." + last)


def opaque(name: bytes) -> bytes:
    return file(name + b"/.wh..wh..opq")


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while length != len(b"%d" % length) + len(key) + len(value) + 3:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


def pax(*records: tuple[bytes, bytes], flag: bytes = b"x") -> bytes:
    return file(b"././@PaxHeader", b"".join(record(*each) for each in records), flag=flag)


def long(flag: bytes, name: bytes) -> bytes:
    return file(b"././@LongLink", name + b"\0", flag=flag, magic=GNU)


def tar(*members: bytes) -> bytes:
    return b"".join(members) + END


def pieces(data: bytes, size: int = 1 << 18) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read(data: bytes, size: int = 1 << 18) -> list[tuple[reader.Entry, bytes]]:
    """Every entry with its whole content."""
    return [(entry, content(entry)) for entry in reader.entries(pieces(data, size))]


def content(entry: reader.Entry) -> bytes:
    return b"".join(
        bytes(piece.length) if isinstance(piece, filesystem.Hole) else bytes(piece)
        for piece in entry.content
    )


def layer(
    path: Path, data: bytes, compression: bundle.Compression = bundle.Compression.NONE
) -> bundle.Layer:
    """A blob on disk, with the digests that a registry would announce."""
    diff_id = f"sha256:{hashlib.sha256(data).hexdigest()}"
    blob = gzip.compress(data, 1) if compression is bundle.Compression.GZIP else data
    path.write_bytes(blob)
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    return bundle.Layer(path, compression, digest, len(blob), diff_id)


def put(fs: filesystem.Filesystem, layers: Iterable[bytes]) -> None:
    """Flattens tars that are at hand."""
    tree = flatten.Tree(fs)
    for number, data in enumerate(layers, 1):
        tree.add(reader.entries(pieces(data)), f"layer {number}")


def listing(fs: filesystem.Filesystem) -> dict[bytes, str]:
    """Every path with its type, permissions and content, in a form that reads well when it differs."""
    found: dict[bytes, str] = {}

    def walk(inode: int, path: bytes) -> None:
        for name, below in fs.children(inode):
            full = path + name
            found[full] = describe(fs, below)
            if stat.S_ISDIR(fs.attributes(below).mode):
                walk(below, full + b"/")

    walk(fs.ROOT, b"")
    return found


def describe(fs: filesystem.Filesystem, inode: int) -> str:
    about = fs.attributes(inode)
    text = f"{stat.filemode(about.mode)} {about.uid}"
    if stat.S_ISREG(about.mode):
        return f"{text} x{fs.link_count(inode)} {b''.join(fs.read(inode)).decode(errors='replace')}"
    if stat.S_ISLNK(about.mode):
        return f"{text} > {fs.readlink(inode).decode(errors='replace')}"
    if stat.S_ISDIR(about.mode):
        return text
    return f"{text} {about.device[0]}:{about.device[1]}"
