# SPDX-License-Identifier: MIT
"""The kernel's own view of the file systems we write: mounted over a loop device, compared, written to."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from banger.contract import errors
from banger.images.mkfs.filesystem import Attributes, Filesystem, Hole
from tests import ext4_model, ext4_read

MIB = 1 << 20
FILE = Attributes(stat.S_IFREG | 0o644)
DIRECTORY = Attributes(stat.S_IFDIR | 0o755)


@contextlib.contextmanager
def mounted(image: Path, options: str) -> Iterator[Path]:
    point = image.with_suffix(".mounted")
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ext4", "-o", f"loop,{options}", image, point], check=True, timeout=60)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True, timeout=60)
        _await_released(image)


def _await_released(image: Path) -> None:
    """A test beside this one that made a mount namespace meanwhile has the mount in it, and so holds it."""
    deadline = time.monotonic() + 60
    while subprocess.run(["losetup", "-j", image], capture_output=True, check=True, timeout=10).stdout:
        assert time.monotonic() < deadline, f"{image} is still mounted somewhere"
        time.sleep(0.05)


def compare(found: Path, root: ext4_model.Node) -> None:
    """Every name there is, and everything that can be asked of it."""
    seen: dict[int, int] = {}
    for path, node in root.walk():
        here = os.fsencode(found) + path
        status = os.lstat(here)
        wanted = node.attributes
        assert (status.st_mode, status.st_uid, status.st_gid) == (wanted.mode, wanted.uid, wanted.gid), path
        assert status.st_mtime_ns == status.st_ctime_ns == status.st_atime_ns == wanted.mtime_ns, path
        assert status.st_nlink == node.links + (path == b"/"), path  # lost+found
        assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == wanted.device
        names = os.listxattr(here, follow_symlinks=False)
        xattrs = {(os.fsencode(name), os.getxattr(here, name, follow_symlinks=False)) for name in names}
        assert xattrs == set(wanted.xattrs), path
        assert seen.setdefault(status.st_ino, id(node)) == id(node)
        if node.is_directory:
            extra = [b"lost+found"] if path == b"/" else []
            assert sorted(os.listdir(here)) == sorted([*node.children, *extra])
        elif stat.S_ISLNK(status.st_mode):
            assert os.readlink(here) == node.content
        elif stat.S_ISREG(status.st_mode):
            assert Path(os.fsdecode(here)).read_bytes() == node.content
    assert len(set(seen.values())) == len(seen)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(ext4_model.steps)
def test_any_tree_is_what_the_kernel_finds(tmp_path: Path, todo: list[ext4_model.Step]) -> None:
    image = tmp_path / "image.ext4"
    image.unlink(missing_ok=True)
    with Filesystem(image) as made:
        root = ext4_model.build(made, todo)
        made.finish(headroom_bytes=MIB)
    ext4_read.check(image)
    with mounted(image, "ro,noatime") as found:
        compare(found, root)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of 100,000 files, one of 65,001 directories, and a file beyond the first copies."""
    image = tmp_path_factory.mktemp("large") / "image.ext4"
    with Filesystem(image) as made:
        files = made.mkdir(made.ROOT, b"files", DIRECTORY)
        for number in range(100_000):
            made.write(files, b"file-%d" % number, FILE, [b"%d" % number])
        directories = made.mkdir(made.ROOT, b"directories", DIRECTORY)
        for number in range(65_001):
            made.mkdir(directories, b"%d" % number, DIRECTORY)
        pieces: list[bytes | Hole] = [os.urandom(MIB), Hole(64 * MIB)]
        made.write(made.ROOT, b"sparse", FILE, pieces * 8)
        made.finish(size_bytes=4096 * MIB)
    return image


def test_names_are_found_through_the_index(large: Path) -> None:
    with mounted(large, "ro") as found:
        for number in range(0, 100_000, 997):
            assert (found / "files" / f"file-{number}").read_text() == str(number)
        for number in range(0, 65_001, 997):
            assert (found / "directories" / str(number)).is_dir()
        assert not (found / "files" / "file-100000").exists()
        assert len(os.listdir(found / "files")) == 100_000
        assert len(os.listdir(found / "directories")) == 65_001
        assert (found / "directories").stat().st_nlink == 1
        assert (found / "sparse").stat().st_size == 8 * 65 * MIB
        assert (found / "sparse").stat().st_blocks * 512 < 9 * MIB


def test_a_guest_can_live_on_it(large: Path) -> None:
    """Large directories grow and shrink, files come and go, through a journal that takes all of it."""
    with mounted(large, "rw,data=journal") as found:
        for number in range(3000):
            (found / "files" / f"file-{number}").unlink()
            (found / "files" / f"another name {number}").write_bytes(b"new")
            (found / "directories" / f"new {number}").mkdir()
        (found / "copy").mkdir()
        for number in range(40):
            (found / "copy" / str(number)).write_bytes(os.urandom(8 * MIB))
        for number in range(0, 40, 2):
            (found / "copy" / str(number)).unlink()
        os.setxattr(found / "sparse", "user.new", b"x" * 2000)
        subprocess.run(["sync", "-f", found], check=True, timeout=120)
    ext4_read.check(large)
    with mounted(large, "ro") as found:
        assert (found / "files" / "another name 2999").read_bytes() == b"new"
        assert (found / "copy" / "39").stat().st_size == 8 * MIB


@pytest.mark.parametrize(
    ("before_mib", "after_mib"), [(16, 64), (64, 3000), (8192, 20_000), (16_300, 40_000), (300, 200)]
)
def test_it_can_be_resized(tmp_path: Path, before_mib: int, after_mib: int) -> None:
    image = tmp_path / "image.ext4"
    data = os.urandom(5 * MIB)
    with Filesystem(image) as made:
        made.write(made.ROOT, b"data", FILE, [data])
        made.finish(size_bytes=before_mib * MIB)
    if after_mib > before_mib:
        os.truncate(image, after_mib * MIB)
    argv = ["resize2fs", str(image), f"{after_mib}M"]
    subprocess.run(argv, check=True, timeout=120, capture_output=True)
    ext4_read.check(image)
    with mounted(image, "rw") as found:
        assert (found / "data").read_bytes() == data
        status = os.statvfs(found)
        assert status.f_blocks * status.f_frsize > after_mib * MIB * 9 // 10
    assert image.stat().st_blocks * 512 < 200 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the host's with room for 8 MiB."""
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", point], check=True, timeout=60)
    yield point
    subprocess.run(["umount", point], check=True, timeout=60)


@pytest.mark.parametrize("content_mib", [7, 20])
def test_a_full_host_disk_is_said_and_nothing_left(small_disk: Path, content_mib: int) -> None:
    """While content arrives, and when only the metadata no longer fits."""
    image = small_disk / "image.ext4"
    pieces = [os.urandom(MIB) for _ in range(content_mib)]
    names = [b"%d" % number + b"n" * 200 for number in range(20_000)]

    def make() -> None:
        with Filesystem(image) as made:
            made.write(made.ROOT, b"data", FILE, pieces)
            for name in names:
                made.write(made.ROOT, name, FILE, [])
            made.finish(headroom_bytes=64 * MIB)

    with pytest.raises(errors.NoSpaceError, match=r"image\.ext4") as caught:
        make()
    assert caught.value.hint
    assert list(small_disk.iterdir()) == []
