# SPDX-License-Identifier: MIT
"""Overlays that cannot overflow, work disks that are whole or absent."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from banger import artefacts
from banger.contract import errors
from banger.storage import overlay, workdisk
from tests import ext4_read

MIB = 1 << 20


def chunks_used(base_chunks: int) -> int:
    """Walks through the kernel's allocation: header, an area's metadata, its chunks, the next area."""
    per_area = overlay.CHUNK_BYTES // 16
    next_free = 2
    for _ in range(base_chunks):
        if next_free % (per_area + 1) == 1:  # the place of the next area's metadata
            next_free += 1
        next_free += 1
    return next_free


@hypothesis.given(strategies.integers(1, 70_000))
@hypothesis.settings(max_examples=25, deadline=None)
def test_a_guest_that_rewrites_everything_fits(base_chunks: int) -> None:
    needed = chunks_used(base_chunks) * overlay.CHUNK_BYTES
    room = overlay.store_bytes(base_chunks * overlay.CHUNK_BYTES)
    assert needed + overlay.CHUNK_BYTES * 258 <= room <= needed + 4 * MIB


def test_a_partial_last_chunk_counts() -> None:
    assert overlay.store_bytes(overlay.CHUNK_BYTES + 1) == overlay.store_bytes(2 * overlay.CHUNK_BYTES)


def test_an_overlay_takes_no_space_until_used(tmp_path: Path) -> None:
    path = tmp_path / "overlay.cow"
    assert overlay.ensure(path, base_bytes=1 << 34) is True
    found = path.stat()
    assert (found.st_size, found.st_blocks) == (overlay.store_bytes(1 << 34), 0)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["overlay.cow"]


def used_overlay(
    path: Path, *, magic: int = 0x70416E53, valid: int = 1, version: int = 1, chunk: int = 8
) -> None:
    overlay.ensure(path, base_bytes=16 * MIB)
    with path.open("r+b") as file:
        file.write(struct.pack("<IIII", magic, valid, version, chunk))


def test_an_earlier_overlay_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "overlay.cow"
    used_overlay(path)
    before = path.read_bytes()[:64]
    assert overlay.ensure(path, base_bytes=16 * MIB) is False
    assert path.read_bytes()[:64] == before


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"magic": 0x12345678}, "not a snapshot store"),
        ({"version": 2}, "not a snapshot store"),
        ({"chunk": 16}, "not a snapshot store"),
        ({"valid": 0}, "marked invalid"),
    ],
)
def test_an_unusable_overlay_is_refused_and_kept(
    tmp_path: Path, header: dict[str, int], reason: str
) -> None:
    path = tmp_path / "overlay.cow"
    used_overlay(path, **header)
    with pytest.raises(errors.OperationFailedError, match=reason) as caught:
        overlay.ensure(path, base_bytes=16 * MIB)
    assert caught.value.hint
    assert path.exists()


def test_an_overlay_of_a_smaller_image_is_refused(tmp_path: Path) -> None:
    overlay.ensure(tmp_path / "overlay.cow", base_bytes=16 * MIB)
    with pytest.raises(errors.OperationFailedError, match="damaged or of another image"):
        overlay.ensure(tmp_path / "overlay.cow", base_bytes=64 * MIB)


def test_a_link_is_no_overlay(tmp_path: Path) -> None:
    (tmp_path / "overlay.cow").symlink_to("/etc/passwd")
    with pytest.raises(errors.OperationFailedError, match="not a regular file"):
        overlay.ensure(tmp_path / "overlay.cow", base_bytes=16 * MIB)


# --- work disk ---


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """What an image's `/root` looks like."""
    path = tmp_path / "work-seed.tar"
    with tarfile.open(path, "w") as archive:
        for name, mode, content in (
            (".", 0o700, None),
            (".bashrc", 0o644, b"PS1=x\n"),
            ("own", 0o4755, b"x"),
        ):
            member = tarfile.TarInfo(name)
            member.mode, member.uid, member.gid = mode, 0, 0
            if name == "own":
                member.uid, member.gid = 1000, 1001
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def test_a_work_disk_has_its_final_size_and_the_seed(tmp_path: Path, seed: Path) -> None:
    disk = tmp_path / "work.ext4"
    workdisk.create(disk, size_mib=8192, seed=seed)
    assert disk.stat().st_size == 8192 * MIB
    assert disk.stat().st_mode == stat.S_IFREG | 0o600
    assert disk.stat().st_blocks * 512 < MIB
    ext4_read.check(disk)
    assert ext4_read.content(disk, "/.bashrc") == b"PS1=x\n"
    top, file = ext4_read.find(disk, "/"), ext4_read.find(disk, "/own")
    assert top is not None
    assert (top.mode, top.uid, top.gid) == (stat.S_IFDIR | 0o700, 0, 0)
    assert file is not None
    assert (file.mode, file.uid, file.gid) == (stat.S_IFREG | 0o4755, 1000, 1001)


def test_a_seed_that_is_gone_is_no_empty_home(tmp_path: Path) -> None:
    """Each image has one: without it the files of its `/root` would be missed for weeks."""
    directory = tmp_path / "vm"
    directory.mkdir()
    with pytest.raises(errors.NotFoundError, match=r"work-seed\.tar") as caught:
        workdisk.create(directory / "work.ext4", size_mib=64, seed=tmp_path / "work-seed.tar")
    assert "make it again" in caught.value.hint
    assert list(directory.iterdir()) == []


def test_a_work_disk_without_seed_is_empty_and_roots(tmp_path: Path) -> None:
    workdisk.create(tmp_path / "work.ext4", size_mib=64)
    top = ext4_read.find(tmp_path / "work.ext4", "/")
    assert top is not None
    assert (top.mode, top.uid) == (stat.S_IFDIR | 0o700, 0)


def test_a_work_disk_is_durable_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row is durable: after the power was gone, what has the name is taken for whole."""
    disk = tmp_path / "work.ext4"
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(artefacts, "sync", lambda path: seen.append((path.name, disk.exists())))
    workdisk.create(disk, size_mib=64)
    assert seen == [(".work.ext4.new", False), (tmp_path.name, True)]


def test_a_work_disk_lets_the_key_in_as_sshd_wants_it(tmp_path: Path, seed: Path) -> None:
    disk = tmp_path / "work.ext4"
    workdisk.create(disk, size_mib=64, seed=seed, authorized_key="ssh-ed25519 AAAA banger")
    ext4_read.check(disk)
    assert ext4_read.content(disk, "/.ssh/authorized_keys") == b"ssh-ed25519 AAAA banger\n"
    directory, file = ext4_read.find(disk, "/.ssh"), ext4_read.find(disk, "/.ssh/authorized_keys")
    assert directory is not None
    assert (directory.mode, directory.uid, directory.gid) == (stat.S_IFDIR | 0o700, 0, 0)
    assert file is not None
    assert (file.mode, file.uid, file.gid) == (stat.S_IFREG | 0o600, 0, 0)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_the_keys_of_the_seed_stay_before_ours_and_no_link_is_followed(tmp_path: Path, kind: bytes) -> None:
    seed, disk = tmp_path / "seed.tar", tmp_path / "work.ext4"
    with tarfile.open(seed, "w") as archive:
        member = tarfile.TarInfo(".ssh/authorized_keys")
        member.type, member.linkname, content = kind, "/etc/passwd", b"ssh-rsa BBBB theirs"
        member.size = len(content) if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(content))
    workdisk.create(disk, size_mib=64, seed=seed, authorized_key="ssh-ed25519 AAAA banger")
    first = content + b"\n" if kind == tarfile.REGTYPE else b""
    assert ext4_read.content(disk, "/.ssh/authorized_keys") == first + b"ssh-ed25519 AAAA banger\n"


def test_a_seed_keeps_everything(tmp_path: Path) -> None:
    seed, disk = tmp_path / "seed.tar", tmp_path / "work.ext4"
    members: tuple[tuple[str, bytes, str, dict[str, str]], ...] = (
        ("deep/er/file", tarfile.REGTYPE, "", {"mtime": "1700000000.123456789", "SCHILY.xattr.user.x": "y"}),
        ("second", tarfile.LNKTYPE, "deep/er/file", {}),
        ("link", tarfile.SYMTYPE, "/absolute", {}),
        ("fifo", tarfile.FIFOTYPE, "", {}),
        ("deep", tarfile.DIRTYPE, "", {}),
        ("replaced", tarfile.SYMTYPE, "deep", {}),
        ("replaced", tarfile.REGTYPE, "", {}),
        ("na\udcffme", tarfile.REGTYPE, "", {}),
    )
    with tarfile.open(seed, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, kind, target, headers in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.pax_headers = kind, target, headers
            member.mode = 0o750
            archive.addfile(member)
    workdisk.create(disk, size_mib=64, seed=seed)
    ext4_read.check(disk)
    names = {b"lost+found", b"deep", b"second", b"link", b"fifo", b"replaced", b"na\xffme"}
    assert ext4_read.names(disk, "/") == names
    file, second, deep = ext4_read.stats(disk, "/deep/er/file", "/second", "/deep")
    assert (file.inode, file.links, file.mtime_ns) == (second.inode, 2, 1_700_000_000_123_456_789)
    assert 'user.x (1) = "y"' in file.text
    assert deep.permissions == 0o750
    kinds = [found.kind for found in ext4_read.stats(disk, "/link", "/fifo", "/replaced")]
    assert kinds == ["symlink", "FIFO", "regular"]


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../out", tarfile.REGTYPE, ""),
        ("/absolute", tarfile.REGTYPE, ""),
        ("hard", tarfile.LNKTYPE, "absent"),
        ("hard", tarfile.LNKTYPE, "../out"),
        ("strange", b"Z", ""),
    ],
)
def test_a_seed_that_would_leave_its_disk_is_refused(
    tmp_path: Path, name: str, kind: bytes, target: str
) -> None:
    seed = tmp_path / "seed.tar"
    with tarfile.open(seed, "w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    with pytest.raises(errors.BadRequestError):
        workdisk.create(tmp_path / "work.ext4", size_mib=64, seed=seed)
    assert not (tmp_path / "work.ext4").exists()


def test_a_work_disk_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "work.ext4").write_bytes(b"user data")
    with pytest.raises(errors.AlreadyExistsError):
        workdisk.create(tmp_path / "work.ext4", size_mib=64)
    assert (tmp_path / "work.ext4").read_bytes() == b"user data"


def test_a_failed_work_disk_leaves_nothing(tmp_path: Path, seed: Path) -> None:
    directory = tmp_path / "vm"
    directory.mkdir()
    seed.write_bytes(seed.read_bytes()[:700])
    with pytest.raises(errors.BadRequestError, match="cut short"):
        workdisk.create(directory / "work.ext4", size_mib=64, seed=seed)
    assert list(directory.iterdir()) == []


def test_a_seed_too_large_says_so(tmp_path: Path) -> None:
    seed = tmp_path / "seed.tar"
    with tarfile.open(seed, "w") as archive:
        member = tarfile.TarInfo("big")
        member.size = 20 * MIB
        archive.addfile(member, io.BytesIO(os.urandom(20 * MIB)))
    with pytest.raises(errors.BadRequestError) as caught:
        workdisk.create(tmp_path / "work.ext4", size_mib=16, seed=seed)
    assert "--disk-size" in caught.value.hint
