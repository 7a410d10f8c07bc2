# SPDX-License-Identifier: MIT
"""The ext4 writer: what it makes is clean, and reads back as it was given, by e2fsprogs."""

from __future__ import annotations

import asyncio
import itertools
import os
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import run
from banger.contract import errors
from banger.images.mkfs import dirhash, filesystem
from banger.images.mkfs.filesystem import Attributes, Filesystem
from tests import ext4_read
from tests.ext4_made import BLOCK, DIRECTORY, FILE, LINK, MIB, make


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where nothing is yet."""
    return tmp_path / "image.ext4"


# --- sizes ---


@pytest.mark.parametrize(
    "size_bytes",
    [
        8 * MIB - BLOCK,
        8 * MIB,
        16 * MIB,
        64 * MIB,
        128 * MIB,
        128 * MIB + BLOCK,
        128 * MIB + 60 * BLOCK,
        256 * MIB + 300 * BLOCK,
        8192 * MIB,
        16384 * MIB,
        16384 * MIB + 200 * MIB,
        (1 << 40),
    ],
)
def test_an_empty_one_is_clean_sparse_and_of_the_size_asked_for(image: Path, size_bytes: int) -> None:
    assert make(image, lambda made: None, size_bytes) == size_bytes
    assert image.stat().st_blocks * 512 < MIB + size_bytes // (1 << 17)
    assert ext4_read.names(image, "/") == {b"lost+found"}


def test_the_size_follows_the_content(image: Path) -> None:
    data = os.urandom(10 * MIB)
    size = make(image, lambda made: made.write(made.ROOT, b"data", FILE, [data]))
    assert 14 * MIB < size < 32 * MIB
    (answer,) = ext4_read.ask(image, "show_super_stats -h")
    free = next(line for line in answer.splitlines() if line.startswith(b"Free blocks"))
    assert int(free.split()[-1]) * BLOCK >= 4 * MIB


def test_a_size_too_small_says_so_and_leaves_nothing(image: Path) -> None:
    data = os.urandom(20 * MIB)
    with pytest.raises(filesystem.DiskTooSmallError, match="16 MiB"):
        make(image, lambda made: made.write(made.ROOT, b"data", FILE, [data]), 16 * MIB)
    assert not image.exists()


def test_more_content_than_allowed_is_refused_while_it_arrives(image: Path) -> None:
    limits = filesystem.Limits(max_bytes=MIB)
    written = 0

    def content() -> object:
        nonlocal written
        while True:
            written += MIB
            yield os.urandom(MIB)

    with pytest.raises(filesystem.DiskTooSmallError), Filesystem(image, limits=limits) as made:
        made.write(made.ROOT, b"data", FILE, content())  # type: ignore[arg-type]
    assert written <= 2 * MIB
    assert not image.exists()


def _fill(made: Filesystem, count: int, name: bytes, attributes: Attributes) -> None:
    for number in range(count):
        made.write(made.ROOT, name % number, attributes, ())


def test_names_that_take_more_memory_than_allowed_are_refused(image: Path) -> None:
    """Names, files and attributes count alike."""
    note = Attributes(FILE.mode, xattrs=((b"user.note", b"yes"),))
    counts = []
    for attributes, name in ((FILE, b"%d"), (FILE, b"a" * 200 + b"%d"), (note, b"%d")):
        with Filesystem(image, limits=filesystem.Limits(max_packed_bytes=MIB)) as made:
            with pytest.raises(errors.BadRequestError, match="files take more than 1 MiB of memory"):
                _fill(made, 20_000, name, attributes)
            counts.append(made.inode_count)
    plain, longer, noted = counts
    assert longer < noted < plain < 16_000


def test_finishing_takes_little_memory_beyond_what_is_kept(image: Path) -> None:
    """Even of one directory with everything: its leaves are packed one by one."""
    with Filesystem(image) as made:
        _fill(made, 30_000, b"%d", FILE)
        tracemalloc.start()
        made.finish()
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 6 * MIB


def test_more_files_than_allowed_are_refused(image: Path) -> None:
    limits = filesystem.Limits(max_inodes=3)
    with Filesystem(image, limits=limits) as made:
        for name in (b"1", b"2", b"3"):
            made.write(made.ROOT, name, FILE, [])
        with pytest.raises(errors.BadRequestError, match="more than 3"):
            made.write(made.ROOT, b"4", FILE, [])


def test_leaving_unfinished_deletes_the_file(image: Path) -> None:
    with Filesystem(image):
        assert image.exists()
    assert not image.exists()


def test_it_can_be_cancelled_and_leaves_nothing(image: Path) -> None:
    asyncio.run(_cancelled(image))
    assert not image.exists()


async def _cancelled(image: Path) -> None:
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless() -> Iterator[bytes]:
        while True:
            loop.call_soon_threadsafe(began.set)
            yield b"x" * BLOCK

    def fill(made: Filesystem) -> None:
        inode = made.write(made.ROOT, b"first", FILE, [b"x"])
        while True:
            made.write(made.ROOT, b"data", FILE, itertools.islice(endless(), 64))
            made.remove(made.ROOT, b"data")
            assert made.size(inode) == 1

    task = asyncio.create_task(run.in_thread(make, image, fill))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_file_that_is_there_is_not_touched(image: Path) -> None:
    image.write_bytes(b"x")
    with pytest.raises(errors.AlreadyExistsError):
        Filesystem(image)
    assert image.read_bytes() == b"x"


# --- attributes ---


@pytest.mark.parametrize(
    "ns",
    [
        0,
        1,
        -1,
        1_700_000_000_123_456_789,
        -(1 << 31) * 10**9,
        (1 << 31) * 10**9,
        (1 << 33) * 10**9 + 999_999_999,
    ],
)
def test_times_are_exact(image: Path, ns: int) -> None:
    with Filesystem(image) as made:
        inode = made.write(made.ROOT, b"file", Attributes(FILE.mode, mtime_ns=ns), [])
        assert made.attributes(inode).mtime_ns == ns
        made.finish(size_bytes=16 * MIB)
    assert ext4_read.stat(image, "/file").mtime_ns == ns


def test_everything_an_inode_says(image: Path) -> None:
    wanted = Attributes(stat.S_IFREG | 0o6755, 70_000, 4_294_967_294, mtime_ns=5)

    def fill(made: Filesystem) -> None:
        made.write(made.ROOT, b"file", wanted, [b"content"])
        made.link(made.ROOT, b"second", made.lookup(made.ROOT, b"file") or 0)
        made.set_attributes(made.ROOT, Attributes(stat.S_IFDIR | 0o1700, 1, 2))
        made.symlink(made.ROOT, b"short", LINK, b"t" * 59)
        made.symlink(made.ROOT, b"long", LINK, b"t" * 60)
        made.symlink(made.ROOT, b"longest", LINK, b"t" * 4095)
        made.mknod(made.ROOT, b"null", Attributes(stat.S_IFCHR | 0o666, device=(1, 3)))
        made.mknod(made.ROOT, b"large", Attributes(stat.S_IFBLK | 0o660, device=(4095, 1048575)))
        made.mknod(made.ROOT, b"fifo", Attributes(stat.S_IFIFO | 0o600))
        made.mknod(made.ROOT, b"socket", Attributes(stat.S_IFSOCK | 0o600))

    make(image, fill)
    names = ("file", "second", "", "short", "long", "longest", "null", "large", "fifo", "socket")
    found = dict(zip(names, ext4_read.stats(image, *(f"/{name}" for name in names)), strict=True))
    assert found["file"].inode == found["second"].inode
    assert (found["file"].permissions, found["file"].links, found["file"].size) == (0o6755, 2, 7)
    assert (found["file"].uid, found["file"].gid, found["file"].mtime_ns) == (70_000, 4_294_967_294, 5)
    assert (found[""].permissions, found[""].uid, found[""].gid, found[""].links) == (0o1700, 1, 2, 3)
    assert f'Fast link dest: "{"t" * 59}"' in found["short"].text
    assert ext4_read.content(image, "/long") == b"t" * 60
    assert ext4_read.content(image, "/longest") == b"t" * 4095
    assert "major: 01:03" in found["null"].text.replace("major/minor number", "major").replace(" (hex", "")
    kinds = [found[name].kind for name in ("null", "large", "fifo", "socket")]
    assert kinds == ["character special", "block special", "FIFO", "socket"]


@pytest.mark.parametrize(
    ("ns", "kept"), [(-(1 << 40) * 10**9, -(1 << 31)), ((1 << 40) * 10**9, 10_737_418_239)]
)
def test_times_out_of_range_become_the_nearest(image: Path, ns: int, kept: int) -> None:
    make(image, lambda made: made.write(made.ROOT, b"file", Attributes(FILE.mode, mtime_ns=ns), []))
    assert ext4_read.stat(image, "/file").mtime_ns // 10**9 == kept


# --- names ---


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256])
def test_names_that_cannot_be_are_refused(image: Path, name: bytes) -> None:
    with Filesystem(image) as made, pytest.raises(errors.BadRequestError):
        made.write(made.ROOT, name, FILE, [])


def test_a_name_is_taken_only_once(image: Path) -> None:
    with Filesystem(image) as made:
        made.write(made.ROOT, b"x", FILE, [])
        with pytest.raises(errors.AlreadyExistsError):
            made.mkdir(made.ROOT, b"x", DIRECTORY)
        made.remove(made.ROOT, b"x")
        made.mkdir(made.ROOT, b"x", DIRECTORY)


def test_names_of_any_bytes(image: Path) -> None:
    names = {bytes((byte,)) * 3 for byte in range(1, 256) if byte not in b"/\n."} | {b"y" * 255}
    make(image, lambda made: [made.write(made.ROOT, name, FILE, []) for name in sorted(names)])
    assert len(ext4_read.names(image, "/")) == len(names) + 1


@pytest.mark.parametrize(
    "name", [b"a", b"abc", b"file", b"n" * 31, b"n" * 32, b"n" * 33, b"name" * 60, b"\xc3\xa4"]
)
def test_the_hash_of_a_name_is_that_of_e2fsprogs(image: Path, name: bytes) -> None:
    seed = bytes(range(16))
    text = "00010203-0405-0607-0809-0a0b0c0d0e0f"
    version = "4" if max(name) > 127 else "half_md4"  # 4: over unsigned bytes
    request = f'dx_hash -h {version} -s {text} "{os.fsdecode(name)}"'
    make(image, lambda made: None)
    (answer,) = ext4_read.ask(image, request)
    assert f" {dirhash.hashes([name], seed)[0]:#x} ".encode() in answer


# --- directories ---


def test_a_directory_of_one_block_and_the_first_of_two(image: Path) -> None:
    def fill(made: Filesystem) -> None:
        for name, count in ((b"one", (BLOCK - 24) // 12), (b"two", (BLOCK - 24) // 12 + 1)):
            directory = made.mkdir(made.ROOT, name, DIRECTORY)
            for number in range(count):
                made.write(directory, b"%04d" % number, FILE, [])

    make(image, fill)
    one, two = ext4_read.stats(image, "/one", "/two")
    assert (one.size, two.size) == (BLOCK, 3 * BLOCK)
    assert ext4_read.stat(image, "/two/0100").size == 0
    (index,) = ext4_read.ask(image, "htree_dump /two")
    assert b"Hash Version: 1" in index


def test_an_index_of_two_levels(image: Path) -> None:
    count = 9000
    names = [b"%05d" % number + b"x" * 240 for number in range(count)]
    make(image, lambda made: [made.write(made.ROOT, name, FILE, []) for name in names])
    assert ext4_read.stat(image, "/").size > 509 * BLOCK
    assert len(ext4_read.names(image, "/")) == count + 1
    (index,) = ext4_read.ask(image, "htree_dump /")
    assert b"Indirect levels: 1" in index


@pytest.mark.parametrize("count", [64_997, 64_998, 64_999, 65_001])
def test_more_subdirectories_than_links_can_be_counted(image: Path, count: int) -> None:
    def fill(made: Filesystem) -> None:
        top = made.mkdir(made.ROOT, b"top", DIRECTORY)
        for number in range(count):
            made.mkdir(top, b"%d" % number, DIRECTORY)
        assert made.link_count(top) == count + 2

    make(image, fill)
    assert ext4_read.stat(image, "/top").links == (count + 2 if count + 2 <= 65_000 else 1)


def test_a_deep_tree_can_be_made_and_removed(image: Path) -> None:
    def fill(made: Filesystem) -> None:
        for top in (b"kept", b"removed"):
            here = made.mkdir(made.ROOT, top, DIRECTORY)
            for _ in range(3000):
                here = made.mkdir(here, b"d", DIRECTORY)
        before = made.inode_count
        made.remove(made.ROOT, b"removed")
        assert made.inode_count == before - 3001

    make(image, fill)
