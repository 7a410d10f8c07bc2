# SPDX-License-Identifier: MIT
"""Tars as GNU tar and Python's tarfile make them, and block by block what neither would write."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from banger.contract import errors
from banger.tarstream import reader
from tests.unit import tars

BYTES = strategies.binary(min_size=1, max_size=20).map(
    lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_")
)
NAMES = strategies.lists(BYTES, min_size=1, max_size=12).map(b"/".join).filter(lambda name: name[0] != 0x2F)
KINDS = strategies.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])


@strategies.composite
def members(draw: strategies.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(os.fsdecode(draw(NAMES)))
    info.type = draw(KINDS)
    info.mode = draw(strategies.integers(0, 0o7777))
    info.uid = draw(strategies.integers(0, (1 << 32) - 1))
    info.gid = draw(strategies.sampled_from([0, 1000, 0o7777777, 0o10000000]))
    info.mtime = draw(strategies.integers(-(1 << 40), 1 << 40))
    if info.type == tarfile.SYMTYPE:
        info.linkname = os.fsdecode(draw(NAMES))
    if info.type == tarfile.REGTYPE:
        info.size = draw(strategies.integers(0, 1500))
    return info


def written(infos: list[tarfile.TarInfo], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, errors="surrogateescape") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(bytes(range(256)) * 6))
    return out.getvalue()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@hypothesis.given(
    infos=strategies.lists(members(), max_size=6), piece=strategies.sampled_from([1, 511, 700, 1 << 18])
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_what_tarfile_writes(form: int, infos: list[tarfile.TarInfo], piece: int) -> None:
    found = tars.read(written(infos, form), piece)
    assert len(found) == len(infos)
    for (entry, content), info in zip(found, infos, strict=True):
        assert entry.name.rstrip(b"/") == os.fsencode(info.name).rstrip(b"/")
        assert stat.S_IMODE(entry.mode) == info.mode
        assert (entry.uid, entry.gid, entry.mtime_ns) == (info.uid, info.gid, info.mtime * 10**9)
        assert entry.target == os.fsencode(info.linkname)
        assert content == (bytes(range(256)) * 6)[: info.size]


@hypothesis.given(data=strategies.binary(max_size=3000), at=strategies.integers(0, 2000))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_bytes_are_read_or_refused(data: bytes, at: int) -> None:
    whole = tars.tar(
        tars.pax((b"path", b"a/b"), (b"mtime", b"1.5")), tars.file(b"x", b"content"), tars.directory(b"d")
    )
    with contextlib.suppress(errors.BadRequestError):
        tars.read(whole[:at] + data + whole[at + len(data) :])


# --- GNU tar ---


def gnu_tar(tmp_path: Path, *options: str) -> list[tuple[reader.Entry, bytes]]:
    """What GNU tar makes of the directory `tree`."""
    archive = tmp_path / "archive.tar"
    argv = ["tar", "-C", str(tmp_path / "tree"), "-cf", str(archive), "--sort=name", *options, "."]
    subprocess.run(argv, check=True, timeout=60)
    return tars.read(archive.read_bytes(), 10_000)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    "form",
    [
        ("--format=gnu",),
        ("--format=pax", "--sparse-version=0.0"),
        ("--format=pax", "--sparse-version=0.1"),
        ("--format=pax", "--sparse-version=1.0"),
        ("--format=oldgnu",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("pieces", [0, 1, 3, 4, 5, 26, 80])
def test_sparse_files(form: tuple[str, ...], pieces: int, tree: Path, tmp_path: Path) -> None:
    expected = bytearray(600_000 + pieces * 20_000)
    for number in range(pieces):
        at = 12_288 + number * 16_384
        expected[at : at + 4096] = bytes([65 + number % 26]) * 4096
    with (tree / "sparse").open("wb") as file:
        file.truncate(len(expected))
        for number in range(pieces):
            file.seek(12_288 + number * 16_384)
            file.write(bytes([65 + number % 26]) * 4096)
    (tree / "z").write_bytes(b"after")
    found = {entry.name: (entry.size, content) for entry, content in gnu_tar(tmp_path, "-S", *form)}
    assert found[b"./sparse"] == (len(expected), bytes(expected))
    assert found[b"./z"] == (5, b"after")


@pytest.mark.parametrize("form", ["gnu", "pax", "ustar"])
def test_long_and_strange_names(form: str, tree: Path, tmp_path: Path) -> None:
    long = b"l" * (250 if form != "ustar" else 90)
    names = [b"caf\xe9", b"new\nline", b"\xff\xfe", long, "ü".encode()]
    for name in names:
        (Path(os.fsdecode(os.fsencode(tree) + b"/" + name))).touch()
    deep = tree / "/".join(["deep" * 4] * (12 if form != "ustar" else 5))
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"x")
    os.symlink("t" * (900 if form != "ustar" else 99), tree / "link")
    found = {entry.name: entry for entry, _ in gnu_tar(tmp_path, f"--format={form}")}
    assert {b"./" + name for name in names} <= found.keys()
    assert os.fsencode("./" + str((deep / "file").relative_to(tree))) in found
    assert found[b"./link"].target == b"t" * (900 if form != "ustar" else 99)


def test_times_before_1970_and_in_nanoseconds(tree: Path, tmp_path: Path) -> None:
    for name, ns in (("a", -1_500_000_000), ("b", 1_700_000_000_123_456_789), ("c", -1)):
        (tree / name).touch()
        os.utime(tree / name, ns=(ns, ns))
    found = {entry.name: entry.mtime_ns for entry, _ in gnu_tar(tmp_path, "--format=pax")}
    kept = {name: (tree / name).stat().st_mtime_ns for name in "abc"}  # what the file system could hold
    assert found[b"./a"] == kept["a"]
    assert found[b"./b"] == kept["b"] == 1_700_000_000_123_456_789
    assert found[b"./c"] == kept["c"]


def test_hard_links(tree: Path, tmp_path: Path) -> None:
    (tree / "a").write_bytes(b"x" * 700)
    os.link(tree / "a", tree / "b")
    found = gnu_tar(tmp_path)
    assert [(entry.name, entry.hard_link, entry.target) for entry, _ in found[1:]] == [
        (b"./a", False, b""),
        (b"./b", True, b"./a"),
    ]


# --- block by block ---


def one(*members: bytes) -> tuple[reader.Entry, bytes]:
    [found] = tars.read(tars.tar(*members))
    return found


def test_a_name_in_two_parts() -> None:
    assert one(tars.header(b"name", prefix=b"a/b"))[0].name == b"a/b/name"
    assert one(tars.header(b"name", prefix=b"a/b", magic=tars.GNU))[0].name == b"name"


def test_archives_older_than_ustar() -> None:
    assert one(tars.file(b"old", b"x", magic=b"", flag=b"\0"))[1] == b"x"
    assert stat.S_ISDIR(one(tars.file(b"old/", magic=b"", flag=b"\0"))[0].mode)


def test_a_checksum_of_signed_bytes() -> None:
    block = tars.header(b"caf\xe9 \xff")
    signed = sum(byte - 256 if byte > 127 else byte for byte in block) - sum(block[148:156]) + 8 * 32
    assert one(tars.header(b"caf\xe9 \xff", checksum=signed))[0].name == b"caf\xe9 \xff"


def test_large_numbers() -> None:
    base256 = b"\x80" + (3_000_000_000).to_bytes(7, "big")
    assert one(tars.header(b"a", uid=base256))[0].uid == 3_000_000_000
    before = (-5 & (1 << 96) - 1).to_bytes(12, "big")
    assert one(tars.header(b"a", mtime=before))[0].mtime_ns == -5 * 10**9


def test_blanks_around_numbers() -> None:
    entry = one(tars.header(b"a", mode=b"   755 \0", uid=b"  12\0", gid=b"     "))[0]
    assert (stat.S_IMODE(entry.mode), entry.uid, entry.gid) == (0o755, 0o12, 0)


def test_a_pax_header_says_more_than_the_header() -> None:
    entry, content = one(
        tars.pax(
            (b"path", b"real \xff name"),
            (b"size", b"3"),
            (b"uid", b"70000"),
            (b"gid", b"80000"),
            (b"mtime", b"-1.5"),
            (b"comment", b"of no interest"),
        ),
        tars.header(b"short", size=0) + tars.padded(b"abc"),
    )
    assert (entry.name, entry.uid, entry.gid, entry.mtime_ns) == (
        b"real \xff name",
        70000,
        80000,
        -1_500_000_000,
    )
    assert content == b"abc"


def test_a_pax_header_is_of_one_member() -> None:
    found = tars.read(tars.tar(tars.pax((b"uid", b"7")), tars.file(b"a"), tars.file(b"b")))
    assert [entry.uid for entry, _ in found] == [7, 0]


def test_a_global_header_is_of_all_that_follow() -> None:
    found = tars.read(
        tars.tar(
            tars.file(b"a"),
            tars.pax((b"uid", b"7"), (b"comment", b"a commit"), flag=b"g"),
            tars.file(b"b"),
            tars.pax((b"uid", b"8")),
            tars.file(b"c"),
            tars.pax((b"gid", b"9"), flag=b"g"),
            tars.file(b"d"),
        )
    )
    assert [(entry.uid, entry.gid) for entry, _ in found] == [(0, 0), (7, 0), (8, 0), (7, 9)]


def test_extended_attributes_are_bytes() -> None:
    capability = b"\x01\0\0\x02\0\x04\0\0\n=\0\0\0\0\0\0\0\0\0\0"
    entry = one(
        tars.pax((b"SCHILY.xattr.security.capability", capability), (b"SCHILY.xattr.user.a=b", b"")),
        tars.file(b"ping"),
    )[0]
    # A key ends at its first `=`.
    assert entry.xattrs == ((b"security.capability", capability), (b"user.a", b"b="))


def test_access_lists_in_words() -> None:
    text = b"user::rw-\nuser:bob:r--:1001,group::r--,group:50:rwx\t#effective:r--,mask::r--,other::---\n"
    entry = one(tars.pax((b"SCHILY.acl.access", text)), tars.file(b"a"))[0]
    rows = [(1, 6, -1), (2, 4, 1001), (4, 4, -1), (8, 7, 50), (16, 4, -1), (32, 0, -1)]
    binary = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *row) for row in rows)
    assert entry.xattrs == ((b"system.posix_acl_access", binary),)


def test_what_is_not_taken_is_skipped() -> None:
    data = tars.tar(tars.file(b"a", b"x" * 5000), tars.file(b"b", b"y" * 1000), tars.file(b"c", b"z"))
    for size in (100, 512, 1 << 18):
        found = []
        for entry in reader.entries(tars.pieces(data, size)):
            taken = next(iter(entry.content))
            assert isinstance(taken, memoryview)
            found.append((entry.name, bytes(taken[:1])))
        assert found == [(b"a", b"x"), (b"b", b"y"), (b"c", b"z")]


def test_an_end_mark_may_be_missing_where_somebody_else_knows_the_end() -> None:
    data = tars.file(b"a", b"x")
    assert [entry.name for entry in reader.entries(tars.pieces(data), end_is_known=True)] == [b"a"]
    with pytest.raises(errors.BadRequestError, match="cut short"):
        list(reader.entries(tars.pieces(data)))
