# SPDX-License-Identifier: MIT
"""The ext4 toolkit on real file systems, with the real e2fsprogs, without mounting anything."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from banger import run
from banger.contract import errors
from banger.images import ext4

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A fresh, empty file system of 16 MiB."""
    path = tmp_path / "fs.ext4"
    ext4.make(path, size_bytes=16 * MIB)
    return path


def blocks(image: Path) -> int:
    said = run.run(["dumpe2fs", "-h", str(image)], deadline_s=10).text
    return int(next(line for line in said.splitlines() if line.startswith("Block count:")).split()[-1])


def test_a_batch_of_every_edit(image: Path) -> None:
    script = ext4.Script()
    script.mkdir("/etc", permissions=0o750, uid=1000, gid=70000)
    script.write("/etc/a file", b"hello\0world", permissions=0o4711, uid=70001, gid=42)
    script.symlink("/etc/link", "/absolute target")
    script.device("/etc/null", mode=stat.S_IFCHR | 0o666, major=1, minor=3)
    script.device("/etc/pipe", mode=stat.S_IFIFO | 0o600, major=0, minor=0)
    script.set_xattr("/etc/a file", "user.note", b"\x01\x02\0\x03")
    ext4.apply(image, script)
    ext4.check(image)
    directory, file = ext4.find(image, "/etc"), ext4.find(image, "/etc/a file")
    assert directory is not None
    assert (directory.mode, directory.uid, directory.gid) == (stat.S_IFDIR | 0o750, 1000, 70000)
    assert file is not None
    assert (file.mode, file.uid, file.gid, file.size) == (stat.S_IFREG | 0o4711, 70001, 42, 11)
    assert ext4.read(image, "/etc/a file") == b"hello\0world"
    kinds = [ext4.find(image, f"/etc/{name}") for name in ("link", "null", "pipe")]
    assert [stat.S_IFMT(found.mode) for found in kinds if found] == [
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFIFO,
    ]
    attribute = run.run(["debugfs", "-R", 'ea_get -x "/etc/a file" user.note', str(image)], deadline_s=10)
    assert "01020003" in attribute.text.replace(" ", "")


def test_exists(image: Path) -> None:
    assert ext4.exists(image, "/lost+found")
    assert not ext4.exists(image, "/nowhere")
    assert not ext4.exists(image, "/nowhere/deeper")


def test_chmod_keeps_the_type_bits(image: Path) -> None:
    ext4.chmod(image, "/", 0o700)
    found = ext4.find(image, "/")
    assert found is not None
    assert found.mode == stat.S_IFDIR | 0o700
    ext4.check(image)


def test_a_mode_without_type_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="type bits"):
        ext4.Script().set_attributes("/etc", mode=0o755)


def test_a_complaint_of_debugfs_is_an_error(image: Path) -> None:
    with pytest.raises(errors.OperationFailedError, match="File not found"):
        ext4.chown(image, "/nowhere", uid=0, gid=0)


def test_an_empty_script_starts_nothing(tmp_path: Path) -> None:
    ext4.apply(tmp_path / "there is no such file", ext4.Script())


def test_a_failing_block_applies_nothing(image: Path) -> None:
    with pytest.raises(errors.BadRequestError), ext4.editing(image) as script:  # noqa: PT012  # the point
        script.mkdir("/new")
        script.mkdir("/not\nencodable")
    assert not ext4.exists(image, "/new")


@pytest.mark.parametrize("path", ["/a\nrm /etc", "/a\rb", "/a\0b", "relative", "/a/../b", "/./a", ""])
def test_names_that_cannot_be_encoded_are_refused(path: str) -> None:
    with pytest.raises(errors.BadRequestError):
        ext4.Script().mkdir(path)


@pytest.mark.parametrize(
    "name", ['q"uote', "sp ace", "ta\tb", "b\\slash", "'", "#hash", "<8>", "-dash", "ü", '""']
)
def test_awkward_names_arrive_exactly(image: Path, tmp_path: Path, name: str) -> None:
    with ext4.editing(image) as script:
        script.mkdir(f"/{name}")
        script.write(f"/{name}/{name}", b"x")
        script.symlink(f"/{name}/link", name)
    ext4.check(image)
    target = tmp_path / "out"
    target.mkdir()
    run.run(["debugfs", "-R", f'rdump / "{target}"', str(image)], deadline_s=20)
    assert name in os.listdir(target)
    assert sorted(os.listdir(target / name)) == sorted([name, "link"])
    assert os.readlink(target / name / "link") == name


def test_reading_something_else_than_a_file(image: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="not a regular file"):
        ext4.read(image, "/lost+found")
    with pytest.raises(errors.NotFoundError):
        ext4.read(image, "/nowhere")


def test_check_finds_damage(image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(1024 + 0x10)
        file.write(b"\xff\xff\xff\x7f")
    with pytest.raises(errors.OperationFailedError):
        ext4.check(image)


@hypothesis.given(size_mib=strategies.integers(1, 4096))
@hypothesis.settings(max_examples=10, deadline=None)
def test_the_file_system_fills_its_file(tmp_path_factory: pytest.TempPathFactory, size_mib: int) -> None:
    path = tmp_path_factory.mktemp("fs") / "fs.ext4"
    ext4.make(path, size_bytes=size_mib * MIB)
    assert path.stat().st_size == size_mib * MIB
    # mke2fs leaves out a last group that would hold little more than its own tables.
    assert 0 <= size_mib * MIB - blocks(path) * ext4.BLOCK_BYTES < 3 * MIB
    path.unlink()


def test_a_failed_make_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(errors.OperationFailedError):
        ext4.make(tmp_path / "fs", size_bytes=16 * MIB, tree=tmp_path / "missing")
    assert not (tmp_path / "fs").exists()


def test_make_never_overwrites(image: Path) -> None:
    with pytest.raises(FileExistsError):
        ext4.make(image, size_bytes=16 * MIB)


def test_a_tree_too_large_for_its_file_system(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "big").write_bytes(os.urandom(4 * MIB))
    with pytest.raises(errors.BangerError):
        ext4.make(tmp_path / "fs", size_bytes=2 * MIB, tree=tmp_path / "tree")
    assert not (tmp_path / "fs").exists()
