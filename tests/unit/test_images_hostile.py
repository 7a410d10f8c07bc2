# SPDX-License-Identifier: MIT
"""Archives made to do harm, each named for its attack: refused by layer and member, and nothing is left."""

from __future__ import annotations

import errno
import gzip
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from banger.contract import errors
from banger.images import bundle, flatten, paths
from banger.images.mkfs import filesystem
from banger.tarstream import pax as pax_headers
from banger.tarstream import reader
from tests.unit import tars
from tests.unit.tars import (
    BLOCK,
    END,
    GNU,
    directory,
    file,
    hard_link,
    header,
    long,
    octal,
    opaque,
    padded,
    pax,
    symlink,
    tar,
    whiteout,
)

DEEP = b"/".join([b"d"] * (paths.MAX_DEPTH + 1))
LOWER = tar(directory(b"etc"), file(b"etc/passwd", b"root"), symlink(b"lib", b"usr/lib"))


def old_sparse(segments: list[tuple[int, int]], real_size: int, more: bytes = b"\0") -> bytes:
    """What stands behind the devices in GNU's old header of a sparse file."""
    rows = b"".join(octal(offset, 12) + octal(length, 12) for offset, length in segments)
    return bytes(41) + rows.ljust(96, b"\0") + more + octal(real_size, 12)


def sparse(*records: tuple[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((b"GNU.sparse." + key, value) for key, value in records)


TREES: dict[str, bytes] = {
    # names
    "a name that climbs": tar(file(b"../escape", b"x")),
    "a name that climbs from below": tar(directory(b"a"), file(b"a/../../escape", b"x")),
    "a name that climbs and comes back": tar(file(b"etc/../etc/passwd", b"x")),
    "a name that ends with a climb": tar(directory(b"a/..")),
    "an absolute name": tar(file(b"/etc/passwd", b"x")),
    "an absolute name with many slashes": tar(file(b"///etc/passwd", b"x")),
    "an absolute directory": tar(directory(b"/etc/")),
    "an absolute name in a pax header": tar(pax((b"path", b"/etc/passwd")), file(b"harmless", b"x")),
    "a climbing name in a pax header": tar(pax((b"path", b"../x")), file(b"harmless", b"x")),
    "a climbing name in a long name": tar(long(b"L", b"../x"), file(b"harmless", b"x", magic=GNU)),
    "a zero byte in a pax name": tar(pax((b"path", b"etc/passwd\0.txt")), file(b"harmless", b"x")),
    "a zero byte in a link's target": tar(pax((b"linkpath", b"a\0b")), symlink(b"link", b"x")),
    "an empty name": tar(file(b"", b"x")),
    "an empty link": tar(symlink(b"link", b"")),
    "a part of a name too long": tar(pax((b"path", b"a" * 256)), file(b"a")),
    "a part in the middle too long": tar(pax((b"path", b"a" * 256 + b"/b")), file(b"a")),
    "a name too long": tar(pax((b"path", b"a/" * 2049)), file(b"a")),
    "a GNU name too long": tar(long(b"L", b"a/" * 2049), file(b"a")),
    "a target too long": tar(pax((b"linkpath", b"a" * 4097)), symlink(b"a", b"b")),
    "a path too deep": tar(pax((b"path", DEEP + b"/x")), file(b"a")),
    "a path made too deep through a link": tar(
        pax((b"path", b"/".join([b"d"] * 200))),
        directory(b"a"),
        pax((b"linkpath", b"/".join([b"d"] * 200))),
        symlink(b"deep", b"x"),
        pax((b"path", b"deep/" + b"/".join([b"e"] * 60))),
        directory(b"b"),
    ),
    "two names in one member": tar(long(b"L", b"one"), pax((b"path", b"two")), file(b"three", b"x")),
    "a file in place of the root": tar(file(b"./", b"x")),
    "a link in place of the root": tar(symlink(b".", b"/etc")),
    "a hard link in place of the root": tar(file(b"x"), hard_link(b".", b"x")),
    # links
    "written through a link that leads out": tar(symlink(b"out", b"../../etc"), file(b"out/passwd", b"x")),
    "written through a link to a link that leads out": tar(
        symlink(b"one", b"two"), symlink(b"two", b"../.."), file(b"one/escape", b"x")
    ),
    "a directory made through a link that leads out": tar(symlink(b"out", b".."), directory(b"out/sub")),
    "hidden through a link that leads out": tar(symlink(b"out", b".."), whiteout(b"out/etc")),
    "a loop of links": tar(symlink(b"a", b"b"), symlink(b"b", b"a"), file(b"a/x", b"x")),
    "a link to itself": tar(symlink(b"a", b"a"), file(b"a/x", b"x")),
    "a link that grows at each turn": tar(symlink(b"a", b"a/a"), file(b"a/x", b"x")),
    "written below a file": tar(file(b"file", b"x"), file(b"file/below", b"x")),
    "written below a device": tar(header(b"dev", b"3", device=(1, 3)), file(b"dev/below", b"x")),
    "written through a link to a file": tar(
        file(b"file", b"x"), symlink(b"a", b"file"), file(b"a/below", b"x")
    ),
    "a hard link to what is outside": tar(hard_link(b"escape", b"../../etc/shadow")),
    "a hard link to what is missing": tar(hard_link(b"escape", b"etc/nothing")),
    "a hard link out through a link": tar(symlink(b"out", b".."), hard_link(b"escape", b"out/etc/passwd")),
    "a hard link to a directory": tar(directory(b"d"), hard_link(b"escape", b"d")),
    "a hard link to the root": tar(hard_link(b"escape", b".")),
    "a hard link to itself": tar(file(b"a", b"x"), hard_link(b"a", b"a")),
    "a hard link that buries its target": tar(file(b"d/e/x", b"x"), hard_link(b"d", b"d/e/x")),
    "a hard link with content": tar(file(b"a", b"x"), header(b"b", b"1", target=b"a", size=512), bytes(512)),
    # whiteouts
    "a whiteout of nothing": tar(file(b".wh.")),
    "a whiteout of the root": tar(file(b".wh..")),
    "a whiteout of what is above": tar(file(b"etc/.wh...")),
    "a whiteout of a whiteout": tar(file(b".wh..wh.x")),
    "a whiteout of the opaque mark": tar(file(b".wh..wh..wh..opq")),
    "a whiteout with content": tar(file(b"etc/.wh.passwd", b"x")),
    "a whiteout that is a directory": tar(directory(b"etc/.wh.passwd")),
    "a whiteout that is a link": tar(symlink(b"etc/.wh.passwd", b"x")),
    "a whiteout that is a device": tar(header(b"etc/.wh.passwd", b"3", device=(0, 0))),
    "a hard link to a whiteout": tar(file(b"etc/.wh.a"), hard_link(b"b", b"etc/.wh.a")),
    "a file inside a whiteout": tar(file(b".wh.etc/x", b"x")),
    "an opaque mark outside": tar(file(b"../.wh..wh..opq")),
    "an absolute whiteout": tar(file(b"/etc/.wh.passwd")),
    # devices and odd types
    "a device number too large": tar(header(b"dev", b"4", device=(1 << 13, 0))),
    "a minor device number too large": tar(header(b"dev", b"4", device=(1, 1 << 20))),
    "a device with content": tar(header(b"dev", b"3", device=(1, 3), size=512), bytes(512)),
    "a directory with content": tar(header(b"d", b"5", size=512), bytes(512)),
    "an unknown type": tar(header(b"odd", b"Z")),
    "a part of a tape": tar(header(b"part", b"M", size=0)),
    "an owner that no owner is": tar(pax((b"uid", b"4294967296")), file(b"a")),
    "a negative owner": tar(file(b"a", uid=b"\xff" * 8)),
    # numbers and headers
    "garbage": os.urandom(1).replace(b"\0", b"x") * 2048,
    "text": b"<html>not found</html>\n".ljust(1024, b" "),
    "a wrong checksum": tar(header(b"a", checksum=1)),
    "a size that is no number": tar(header(b"a", size=b"12z4")),
    "a negative size": tar(header(b"a", size=b"\xff" * 12)),
    "a size beyond any file": tar(header(b"a", size=b"\x80" + b"\0" * 2 + b"\x7f" + b"\xff" * 8)),
    "a size that lies": header(b"a", size=1 << 30) + b"x" * 512,
    "a size in a pax header that lies": pax((b"size", b"99999999")) + file(b"a", b"x" * 512),
    "a pax size beyond any file": tar(pax((b"size", b"9" * 20)), file(b"a")),
    "a mode that is no number": tar(header(b"a", mode=b"rwxrwxrw")),
    "a pax header too large": tar(header(b"x", b"x", size=pax_headers.MAX_BYTES + 1)),
    "a long name that never ends": tar(header(b"x", b"L", size=1 << 32, magic=GNU)),
    "a pax record that lies about its length": tar(file(b"x", b"99 path=a\n", flag=b"x"), file(b"a")),
    "a pax record of no length": tar(file(b"x", b"0 path=a\n", flag=b"x"), file(b"a")),
    "a pax record without a value": tar(file(b"x", b"6 abc\n", flag=b"x"), file(b"a")),
    "a pax time that is none": tar(pax((b"mtime", b"1e999")), file(b"a")),
    "a pax size that is none": tar(pax((b"size", b"-1")), file(b"a")),
    "two pax headers for one member": tar(pax((b"path", b"a")), pax((b"path", b"b")), file(b"c")),
    "a global header that names members": tar(pax((b"path", b"all"), flag=b"g"), file(b"a")),
    "a global header that sets sizes": tar(pax((b"size", b"0"), flag=b"g"), file(b"a", b"x" * 512)),
    "an attribute's name too long": tar(pax((b"SCHILY.xattr." + b"u" * 256, b"x")), file(b"a")),
    "an attribute too large": tar(pax((b"SCHILY.xattr.user.a", b"x" * 70_000)), file(b"a")),
    "an attribute without a name": tar(pax((b"SCHILY.xattr.user.", b"x")), file(b"a")),
    "an access list that is none": tar(pax((b"SCHILY.acl.access", b"user::rwx,evil")), file(b"a")),
    "an access list with names": tar(
        pax((b"SCHILY.acl.access", b"user::rwx,user:bob:rwx,group::r--,mask::r--,other::r--")), file(b"a")
    ),
    "an access list with a number without end": tar(
        pax((b"SCHILY.acl.access", b"u::rwx,u:%s:rwx,g::r--,m::r--,o::r--" % (b"9" * 5000))), file(b"a")
    ),
    "a damaged binary access list": tar(
        pax((b"SCHILY.xattr.system.posix_acl_access", b"\2\0\0\0abc")), file(b"a")
    ),
    # ends
    "an archive cut in a header": tar(file(b"a", b"x"))[:700],
    "an archive cut in a file": file(b"a", b"x" * 2000)[:1024],
    "an archive cut after a member": file(b"a", b"x" * 100),
    "an archive cut in its end mark": file(b"a", b"x") + bytes(BLOCK),
    "an archive behind the end mark": tar(file(b"a", b"x")) + tar(file(b"hidden", b"x")),
    "a lone block of zeros": file(b"a") + bytes(BLOCK) + tar(file(b"hidden", b"x")),
    "a header that announces nothing": tar(pax((b"path", b"a"))),
    "an empty blob": b"",
    # sparse files
    "sparse pieces that overlap": tar(
        header(b"a", b"S", size=1024, magic=GNU, tail=old_sparse([(0, 512), (256, 512)], 4096)), bytes(1024)
    ),
    "sparse pieces behind the end": tar(
        header(b"a", b"S", size=512, magic=GNU, tail=old_sparse([(1 << 20, 512)], 4096)), bytes(512)
    ),
    "sparse pieces that are not stored": tar(
        header(b"a", b"S", size=512, magic=GNU, tail=old_sparse([(0, 4096)], 4096)), bytes(512)
    ),
    "a sparse file beyond any size": tar(
        pax(*sparse((b"map", b"0,1"), (b"size", b"9" * 19))), file(b"a", b"x")
    ),
    "a sparse map without an end": header(b"a", b"S", magic=GNU, tail=old_sparse([], 0, b"\1"))
    + (octal(0, 12) * 42 + b"\1" + bytes(7)) * 7000,
    "a sparse map with an odd number": tar(
        pax(*sparse((b"map", b"0,1,2"), (b"size", b"4"))), file(b"a", b"x")
    ),
    "a sparse map larger than its file": tar(
        pax(*sparse((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"4"))), file(b"a", b"7\n1\n2\n")
    ),
    "a sparse map of a billion pieces": tar(
        pax(*sparse((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"4"))), file(b"a", b"1000000000\n")
    ),
    "a sparse map that is text": tar(
        pax(*sparse((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"4"))), file(b"a", b"x" * 512)
    ),
    "a sparse directory": tar(pax(*sparse((b"map", b""), (b"size", b"0"))), directory(b"a")),
    "a sparse name that climbs": tar(
        pax(*sparse((b"name", b"../../x"), (b"map", b"0,1"), (b"size", b"1"))), file(b"a", b"x")
    ),
    "sparse in an unknown form": tar(pax(*sparse((b"major", b"7"), (b"minor", b"0"))), file(b"a", b"x")),
}


def image(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "image.ext4"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "deep").mkdir()
    yield
    assert list((tmp_path / "deep").iterdir()) == []
    assert not list(tmp_path.rglob("*escape*"))


@pytest.mark.parametrize("attack", TREES)
def test_hostile_archive(attack: str, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(TREES[attack])
    layers = [
        tars.layer(tmp_path / "lower", LOWER),
        bundle.Layer(blob, bundle.Compression.NONE, "sha256:attack", len(TREES[attack])),
    ]
    with (
        pytest.raises(errors.BadRequestError, match=r"^layer 2 of 2 \(sha256:attack\)") as caught,
        filesystem.Filesystem(image(tmp_path)) as fs,
    ):
        flatten.flatten(fs, layers)
    assert caught.value.hint
    assert "\0" not in str(caught.value)


def test_the_error_names_the_member(tmp_path: Path) -> None:
    hostile = tar(file(b"good", b"x"), file(b"etc/../../bad\n", b"x"))
    with (
        pytest.raises(errors.BadRequestError, match=r"layer 1, 'etc/../../bad\\n': its name climbs"),
        filesystem.Filesystem(image(tmp_path)) as fs,
    ):
        tars.put(fs, [hostile])


# --- bombs: bounded memory, bounded disk ---


def zeros(count: int) -> Iterator[bytes]:
    block = bytes(1 << 20)
    yield header(b"zeros", size=count)
    for _ in range(count >> 20):
        yield block
    yield END


BOMBS: dict[str, Callable[[Iterator[bytes]], bytes]] = {
    "gzip": lambda parts: gzip.compress(b"".join(parts), 1),
    "zstd": lambda parts: zstandard.ZstdCompressor(level=1).compress(b"".join(parts)),
}


@pytest.mark.parametrize("compression", BOMBS)
def test_decompression_bomb(compression: str, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(BOMBS[compression](zeros(128 << 20)))
    layer = bundle.Layer(blob, bundle.Compression(compression), "sha256:bomb", 1)
    tracemalloc.start()
    try:
        with (
            pytest.raises(errors.BadRequestError, match="come out of the layer"),
            filesystem.Filesystem(image(tmp_path)) as fs,
        ):
            flatten.flatten(fs, [layer], limits=flatten.Limits(max_bytes=100 << 20))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_of_many_layers(tmp_path: Path) -> None:
    layers = [tars.layer(tmp_path / f"l{number}", tar(file(b"a", b"x" * 600_000))) for number in range(3)]
    with (
        pytest.raises(errors.BadRequestError, match="layer 2 of 3"),
        filesystem.Filesystem(image(tmp_path)) as fs,
    ):
        flatten.flatten(fs, layers, limits=flatten.Limits(max_bytes=1_000_000))


def test_content_beyond_the_disk(tmp_path: Path) -> None:
    limits = filesystem.Limits(max_bytes=1 << 20)
    with (
        pytest.raises(filesystem.DiskTooSmallError),
        filesystem.Filesystem(image(tmp_path), limits=limits) as fs,
    ):
        tars.put(fs, [tar(file(b"big", os.urandom(4 << 20)))])


def endless(member: Callable[[int], bytes]) -> Iterator[bytes]:
    number = 0
    while True:
        yield b"".join(member(number + each) for each in range(100))
        number += 100


ENDLESS: dict[str, Callable[[int], bytes]] = {
    "files": lambda number: file(b"f%d" % number),
    "directories": lambda number: directory(b"d%d/x" % number),
    "links": lambda number: symlink(b"l%d" % number, b"target"),
    "hard links to one file": lambda number: hard_link(b"h%d" % number, b"etc/passwd"),
    "the same file": lambda number: file(b"same"),
    "the same directory": lambda number: directory(b"etc"),
    "whiteouts": lambda number: file(b".wh.x%d" % number),
    "implied directories": lambda number: file(b"a%d/b/c/d/e/f" % number),
}


def flood(fs: filesystem.Filesystem, pieces: Iterator[bytes]) -> None:
    tree = flatten.Tree(fs, flatten.Limits(max_members=8000))
    tree.add(reader.entries(tars.pieces(LOWER)), "layer 1")
    tree.add(reader.entries(pieces), "layer 2")


@pytest.mark.parametrize("what", ENDLESS)
def test_millions_of_entries(what: str, tmp_path: Path) -> None:
    limits = filesystem.Limits(max_inodes=3000)
    with (
        pytest.raises(errors.BadRequestError),
        filesystem.Filesystem(image(tmp_path), limits=limits) as fs,
    ):
        flood(fs, endless(ENDLESS[what]))


def test_a_sparse_file_of_terabytes_costs_nothing(tmp_path: Path) -> None:
    huge = tar(pax(*sparse((b"map", b"0,1"), (b"size", b"%d" % (1 << 43)))), file(b"a", b"x"))
    with filesystem.Filesystem(image(tmp_path)) as fs:
        tars.put(fs, [huge])
        assert fs.size(fs.lookup(fs.ROOT, b"a") or 0) == 1 << 43
        assert fs.content_bytes < 1 << 20


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)  # the one call that writes content
    with (
        pytest.raises(errors.NoSpaceError),
        filesystem.Filesystem(image(tmp_path)) as fs,
    ):
        tars.put(fs, [tar(file(b"a", b"x" * 5_000_000))])


def test_the_lower_layer_is_harmless(tmp_path: Path) -> None:
    with filesystem.Filesystem(image(tmp_path)) as fs:
        tars.put(fs, [LOWER, tar(opaque(b"etc"), file(b"lib/x", padded(b"x")))])
        assert sorted(tars.listing(fs)) == [b"etc", b"lib", b"usr", b"usr/lib", b"usr/lib/x"]


def test_there_are_enough() -> None:
    assert len(TREES) + len(BOMBS) + len(ENDLESS) >= 100
