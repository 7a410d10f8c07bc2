# SPDX-License-Identifier: MIT
"""The ext4 writer: content, what becomes of it when it is removed, extended attributes, and any tree."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from pathlib import Path

import hypothesis
import pytest

from banger.contract import errors
from banger.images.mkfs.filesystem import Attributes, Filesystem, Hole
from tests import ext4_model, ext4_read
from tests.ext4_made import BLOCK, DIRECTORY, FILE, MIB, make


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where nothing is yet."""
    return tmp_path / "image.ext4"


# --- content ---


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 128 * 1024, MIB + 1])
@pytest.mark.parametrize("piece", [997, BLOCK, 1 << 20])
def test_content_of_any_length_in_any_pieces(image: Path, size: int, piece: int) -> None:
    data = os.urandom(size)
    pieces = [data[at : at + piece] for at in range(0, size, piece)]

    def fill(made: Filesystem) -> None:
        inode = made.write(made.ROOT, b"file", FILE, pieces, size=size)
        assert b"".join(made.read(inode)) == data
        assert made.size(inode) == size

    make(image, fill)
    assert ext4_read.stat(image, "/file").size == size
    assert ext4_read.content(image, "/file") == data


@pytest.mark.parametrize(
    ("pieces", "blocks"),
    [
        ([Hole(0)], 0),
        ([Hole(1)], 0),
        ([bytes(MIB)], 0),
        ([b"x", Hole(BLOCK)], 1),
        ([Hole(BLOCK - 1), b"x"], 1),
        ([b"x" * BLOCK, Hole(1 << 30), b"y"], 2),
        ([b"x" * 100, Hole(BLOCK), b"y" * BLOCK, Hole(5)], 3),
        ([bytes(BLOCK), b"x", bytes(3 * BLOCK)], 1),
    ],
)
def test_zeros_take_no_blocks(image: Path, pieces: list[bytes | Hole], blocks: int) -> None:
    data = b"".join(bytes(each.length) if isinstance(each, Hole) else each for each in pieces)

    def fill(made: Filesystem) -> None:
        inode = made.write(made.ROOT, b"file", FILE, pieces)
        assert made.content_bytes == blocks * BLOCK
        if len(data) < 64 * MIB:
            assert b"".join(made.read(inode)) == data

    make(image, fill)
    found = ext4_read.stat(image, "/file")
    assert (found.size, found.sectors) == (len(data), blocks * 8)


@pytest.mark.parametrize("runs", [1, 4, 5, 340, 341, 4 * 340, 4 * 340 + 1, 340 * 5 + 3])
def test_files_in_many_pieces(image: Path, runs: int) -> None:
    data = b"".join(struct.pack("<I", number + 1) * (BLOCK // 4) + bytes(BLOCK) for number in range(runs))

    def fill(made: Filesystem) -> None:
        kept = made.write(made.ROOT, b"file", FILE, [data])
        assert b"".join(made.read(kept)) == data
        before = made.content_bytes
        made.write(made.ROOT, b"removed", FILE, [data])
        made.remove(made.ROOT, b"removed")
        assert made.content_bytes == before

    make(image, fill)
    assert ext4_read.content(image, "/file") == data


def test_a_tree_of_three_levels(image: Path) -> None:
    pieces: list[bytes | Hole] = [b"x" * BLOCK, Hole(BLOCK)] * (340 * 340 + 5)
    with Filesystem(image) as made:
        inode = made.write(made.ROOT, b"kept", FILE, pieces)
        assert sum(len(piece) for piece in made.read(inode)) == len(pieces) * BLOCK
        made.finish()
    ext4_read.check(image)


def test_a_file_over_group_boundaries(image: Path) -> None:
    """Longer than one extent may be, and beyond two groups that start with a copy of the superblock."""
    data = os.urandom(MIB)
    make(image, lambda made: made.write(made.ROOT, b"file", FILE, (data for _ in range(520))))
    content = ext4_read.content(image, "/file")
    assert content == data * 520


@pytest.mark.parametrize("size", [6, 8])
def test_content_that_is_not_of_the_size_it_claims_is_refused(image: Path, size: int) -> None:
    with Filesystem(image) as made:
        with pytest.raises(errors.BadRequestError):
            made.write(made.ROOT, b"file", FILE, [b"content"], size=size)
        assert made.lookup(made.ROOT, b"file") is None
        with pytest.raises(ValueError, match="half a file"):
            made.finish()


# --- removing ---


def test_what_is_removed_is_used_again_and_never_read(image: Path) -> None:
    secret = b"secret" * (MIB // 6)

    def fill(made: Filesystem) -> None:
        for _ in range(50):
            directory = made.mkdir(made.ROOT, b"layer", DIRECTORY)
            for number in range(10):
                made.write(directory, b"%d" % number, FILE, [secret])
            made.remove(made.ROOT, b"layer")
        assert made.content_bytes == 0
        made.write(made.ROOT, b"kept", FILE, [b"kept"])

    assert make(image, fill) < 40 * MIB
    assert b"secret" not in image.read_bytes()


def test_a_file_lives_as_long_as_one_of_its_names(image: Path) -> None:
    def fill(made: Filesystem) -> None:
        directory = made.mkdir(made.ROOT, b"d", DIRECTORY)
        inode = made.write(directory, b"first", FILE, [b"content"])
        made.link(made.ROOT, b"second", inode)
        made.remove(made.ROOT, b"d")
        assert made.link_count(inode) == 1
        assert b"".join(made.read(inode)) == b"content"

    make(image, fill)
    assert ext4_read.content(image, "/second") == b"content"


# --- extended attributes ---


@pytest.mark.parametrize("length", [0, 1, 59, 60, 61, 68, 72, 73, 500, 4000])
def test_extended_attributes_of_any_length(image: Path, length: int) -> None:
    xattrs = ((b"security.capability", b"\1\0\0\2" + bytes(16)), (b"user.test", b"v" * length))

    def fill(made: Filesystem) -> None:
        inode = made.write(made.ROOT, b"file", Attributes(FILE.mode, xattrs=xattrs), [])
        assert made.attributes(inode).xattrs == xattrs

    make(image, fill)
    answers = ext4_read.ask(image, "ea_list /file", "ea_get -V /file user.test")
    assert b"security.capability (20)" in answers[0]
    assert b"user.test (%d)" % length in answers[0]
    assert b"v" * length in answers[1]


def test_extended_attributes_that_do_not_fit_are_refused(image: Path) -> None:
    with Filesystem(image) as made:
        with pytest.raises(errors.BadRequestError, match="larger than ext4"):
            made.write(
                made.ROOT, b"file", Attributes(FILE.mode, xattrs=((b"user.x", bytes(4090)),)), [b"content"]
            )
        with pytest.raises(errors.BadRequestError, match="named"):
            made.write(made.ROOT, b"file", Attributes(FILE.mode, xattrs=((b"wrong.x", b""),)), [])
        assert made.lookup(made.ROOT, b"file") is None
        made.finish()
    ext4_read.check(image)


def test_blocks_of_extended_attributes_are_given_back(image: Path) -> None:
    large = Attributes(FILE.mode, xattrs=((b"user.x", bytes(3000)),))
    with Filesystem(image) as made:
        inode = made.write(made.ROOT, b"file", large, [])
        assert made.content_bytes == BLOCK
        made.set_attributes(inode, FILE)
        assert made.content_bytes == 0
        made.set_attributes(inode, large)
        made.remove(made.ROOT, b"file")
        assert made.content_bytes == 0


def test_labels_and_uuids(image: Path) -> None:
    uuid = bytes(range(1, 17))
    with Filesystem(image) as made:
        made.finish(size_bytes=16 * MIB, label="banger-work", uuid=uuid)
    told = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, check=True, timeout=30).stdout
    assert b"banger-work" in told
    assert b"01020304-0506-0708-090a-0b0c0d0e0f10" in told


# --- any tree ---


@hypothesis.settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(ext4_model.steps)
def test_any_tree_is_told_as_it_was_made(tmp_path: Path, todo: list[ext4_model.Step]) -> None:
    """By the file system being made. What the kernel says of it is asked in the root tests."""
    image = tmp_path / "image.ext4"
    image.unlink(missing_ok=True)
    with Filesystem(image) as made:
        root = ext4_model.build(made, todo)
        nodes = [node for _, node in root.walk()]
        assert made.inode_count == len({id(node) for node in nodes}) - 1
        for node in nodes:
            assert _told(made, node.inode) == (node.attributes, node.links, node.content)
            if node.is_directory:
                children = {name: child.inode for name, child in node.children.items()}
                assert dict(made.children(node.inode)) == children
                assert all(made.lookup(node.inode, name) == child for name, child in children.items())
        made.finish(headroom_bytes=MIB)
    ext4_read.check(image)


def _told(made: Filesystem, inode: int) -> tuple[Attributes, int, bytes]:
    attributes = made.attributes(inode)
    content = b""
    if stat.S_ISREG(attributes.mode):
        content = b"".join(made.read(inode))
    elif stat.S_ISLNK(attributes.mode):
        content = made.readlink(inode)
    return attributes, made.link_count(inode), content
