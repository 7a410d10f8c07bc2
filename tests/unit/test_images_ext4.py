# SPDX-License-Identifier: MIT
"""Looking at real file systems with the real e2fsprogs, without mounting anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from banger.contract import errors
from banger.images import ext4
from banger.images.mkfs.filesystem import Attributes, Filesystem

AWKWARD = ('q"uote', "sp ace", "ta\tb", "b\\slash", "'", "#hash", "<8>", "-dash", "ü", '""')


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A file system with directories of awkward names."""
    path = tmp_path / "fs.ext4"
    with Filesystem(path) as fs:
        for name in AWKWARD:
            fs.mkdir(fs.ROOT, os.fsencode(name), Attributes(stat.S_IFDIR | 0o755))
        fs.symlink(fs.ROOT, b"dangling", Attributes(stat.S_IFLNK | 0o777), b"/nowhere")
        fs.finish(size_bytes=16 << 20)
    return path


def test_what_is_there_and_what_is_not(image: Path) -> None:
    for name in ("", "lost+found", "dangling", *AWKWARD):
        assert ext4.exists(image, f"/{name}"), name
    for name in ("nowhere", "nowhere/deeper", "lost", "q"):
        assert not ext4.exists(image, f"/{name}"), name


@pytest.mark.parametrize("path", ["/a\nrm /etc", "/a\rb", "/a\0b", "relative", "/a/../b", "/./a", ""])
def test_names_that_cannot_be_encoded_are_refused(image: Path, path: str) -> None:
    with pytest.raises(errors.BadRequestError):
        ext4.exists(image, path)


def test_what_is_no_file_system_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 20))
    with pytest.raises(errors.OperationFailedError, match="zeros"):
        ext4.exists(tmp_path / "zeros", "/etc")


def test_check_finds_damage(image: Path) -> None:
    ext4.check(image)
    with image.open("r+b") as file:
        file.seek(4096)  # where the first group says that its tables are
        file.write(bytes(12))
    with pytest.raises(errors.OperationFailedError):
        ext4.check(image)
