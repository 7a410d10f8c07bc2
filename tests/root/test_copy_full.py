# SPDX-License-Identifier: MIT
"""A guest that sends without end does not fill the disk that `vm cp` writes to."""

from __future__ import annotations

import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger import archive
from banger.contract import errors

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small one."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=4000", "none", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def one_file() -> Iterator[bytes]:
    info = tarfile.TarInfo("much")
    info.size = 1 << 40
    yield info.tobuf()
    while True:
        yield bytes(MIB)


def small_files() -> Iterator[bytes]:
    """Each with a little in it: blocks and names go together."""
    number = 0
    while True:
        info = tarfile.TarInfo(f"file-{number}")
        info.size = 1
        yield info.tobuf() + bytes(512)
        number += 1


def test_one_file_without_end(disk: Path) -> None:
    with pytest.raises(errors.NoSpaceError, match=f"no space left in {disk}") as raised:
        archive.unpack(one_file(), disk, rename=None, report=lambda _: None)
    found = os.statvfs(disk)
    assert found.f_bavail * found.f_frsize >= MIB
    assert raised.value.hint
    assert (disk / "much").stat().st_size > 30 * MIB, "and not before it has to"


def test_files_without_end(disk: Path) -> None:
    with pytest.raises(errors.NoSpaceError, match=f"no space left in {disk}"):
        archive.unpack(small_files(), disk, rename=None, report=lambda _: None)
    assert os.statvfs(disk).f_favail >= 100
    assert len(os.listdir(disk)) > 3000


def test_a_disk_that_is_nearly_full_takes_what_fits(disk: Path) -> None:
    """What is kept free is a part of a small disk, so that it can be used at all."""
    (disk / "other").write_bytes(bytes(30 * MIB))
    info = tarfile.TarInfo("little")
    info.size = MIB
    pieces = [info.tobuf(), bytes(MIB), bytes(1024)]
    assert archive.unpack(pieces, disk, rename=None, report=lambda _: None).entries == 1
