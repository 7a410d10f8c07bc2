# SPDX-License-Identifier: MIT
"""Layers assembled into images, images published whole; no root needed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import hypothesis
import msgspec
import pytest
from hypothesis import strategies

from banger.contract import errors
from banger.images import assemble, bundle, ext4, paths, publish, records
from banger.images.mkfs import filesystem
from tests import ext4_read
from tests.unit import tars
from tests.unit.tars import directory, file, hard_link, pax, symlink, tar

MIB = 1 << 20

SYSTEM = tar(
    directory(b"./"),
    directory(b"./usr/bin"),
    directory(b"./usr/lib/systemd"),
    directory(b"./root", 0o700),
    pax((b"mtime", b"1700000000.5"), (b"SCHILY.xattr.user.note", b"\xff\0")),
    file(b"./root/.profile", b"umask 022\n"),
    hard_link(b"./root/.login", b"./root/.profile"),
    symlink(b"./root/link", b"/usr/bin"),
    directory(b"./root/caf\xe9"),
    file(b"./root/caf\xe9/own", b"x" * 5000, mode=0o4750, uid=1000, gid=1001),
    file(b"./usr/bin/su", b"\x7fELF su", mode=0o4755),
    file(b"./usr/lib/systemd/systemd", b"\x7fELF init", mode=0o755),
    symlink(b"./sbin", b"usr/bin"),
    symlink(b"./usr/bin/init", b"/usr/lib/systemd/systemd"),
)


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(b"\x7fELF guest")
    return path


@pytest.fixture
def images(tmp_path: Path) -> records.Images:
    return records.Images(tmp_path / "images")


Assembled = Callable[..., records.Image]


@pytest.fixture
def assembled(images: records.Images, guest: Path, tmp_path: Path) -> Assembled:
    """Makes an image of tars."""

    def make(*layers: bytes, name: str = "small", **options: object) -> records.Image:
        blobs = tuple(tars.layer(tmp_path / f"layer{n}", data) for n, data in enumerate(layers))
        run = bundle.RunConfig(entrypoint=("/bin/web",), command=("-p", "80"), env=("A=1",), user="7")
        made = bundle.Bundle("registry.test/web:1", "sha256:abc", "x86_64", blobs, run)
        given = {"guest_binary": guest, "kernel": "generic-6.12", "headroom_mib": 16} | options
        return assemble.assemble(images, made, name=name, **given)  # type: ignore[arg-type]

    return make


@pytest.fixture
def fs(tmp_path: Path) -> filesystem.Filesystem:
    made = filesystem.Filesystem(tmp_path / "fs.ext4")
    tars.put(made, [SYSTEM])
    return made


# --- paths ---


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (b"/sbin/init", b"/usr/lib/systemd/systemd"),
        (b"/sbin/../usr/bin/su", None),
        (b"/", b""),
        (b"/missing", None),
        (b"/loop", None),
        (b"/up", None),
        (b"/root/link/su", b"/usr/bin/su"),
        (b"/usr/bin/su/below", None),
        (b"/back/bin/su", b"/usr/bin/su"),
    ],
)
def test_links_are_followed_as_the_guest_would(
    fs: filesystem.Filesystem, path: bytes, found: bytes | None
) -> None:
    tars.put(fs, [tar(symlink(b"loop", b"loop"), symlink(b"up", b".."), symlink(b"back", b"usr/bin/.."))])
    plain = None if found is None else fs.ROOT
    for part in (found or b"").split(b"/")[1:]:
        plain = fs.lookup(plain or 0, part)
    assert paths.Paths(fs).find(path) == plain


# --- images ---


def test_a_published_image(images: records.Images, assembled: Assembled, guest: Path) -> None:
    made = assembled(SYSTEM, tar(file(b"usr/top", b"top layer")))
    rootfs = images.rootfs(made.id)
    ext4.check(rootfs)
    assert rootfs.stat().st_size == made.size_bytes >= 16 * MIB
    assert rootfs.stat().st_blocks * 512 == made.stored_bytes < 2 * MIB
    assert (made.has_init, made.kernel, made.name) == (True, "generic-6.12", "small")
    assert (made.source, made.reference, made.digest) == ("registry.test/web:1",) * 2 + ("sha256:abc",)
    assert made.run.argv == ("/bin/web", "-p", "80")
    assert [layer.size_bytes for layer in made.layers] == [len(SYSTEM), made.layers[1].size_bytes]
    assert images.read(made.id) == made
    injected = ext4_read.find(rootfs, "/.banger/guest")
    assert injected is not None
    assert (injected.mode, injected.uid) == (stat.S_IFREG | 0o755, 0)
    assert ext4_read.content(rootfs, "/.banger/guest") == guest.read_bytes()
    assert ext4_read.content(rootfs, "/usr/top") == b"top layer"


def test_the_home_directory_is_the_seed(images: records.Images, assembled: Assembled) -> None:
    made = assembled(SYSTEM)
    rootfs = images.rootfs(made.id)
    home = ext4_read.find(rootfs, "/root")
    assert home is not None
    assert home.mode == stat.S_IFDIR | 0o700
    assert not ext4.exists(rootfs, "/root/.profile")
    seed = {
        entry.name.rstrip(b"/"): (entry, content)
        for entry, content in tars.read(images.work_seed(made.id).read_bytes())
    }
    assert seed.keys() == {b".", b".profile", b".login", b"link", b"caf\xe9", b"caf\xe9/own"}
    assert seed[b"."][0].mode == stat.S_IFDIR | 0o700
    first, second = sorted((seed[b".profile"][0], seed[b".login"][0]), key=lambda entry: entry.hard_link)
    assert (first.hard_link, second.hard_link, second.target) == (False, True, first.name)
    assert (first.mtime_ns, first.xattrs) == (1_700_000_000_500_000_000, ((b"user.note", b"\xff\0"),))
    assert seed[b"link"][0].target == b"/usr/bin"
    own, content = seed[b"caf\xe9/own"]
    assert (own.mode, own.uid, own.gid) == (stat.S_IFREG | 0o4750, 1000, 1001)
    assert content == b"x" * 5000


def test_a_home_that_is_a_link_is_followed(images: records.Images, assembled: Assembled) -> None:
    made = assembled(tar(symlink(b"root", b"var/roothome"), file(b"var/roothome/x", b"1")))
    assert not ext4.exists(images.rootfs(made.id), "/var/roothome/x")
    with tarfile.open(images.work_seed(made.id)) as seed:
        assert seed.getnames() == [".", "x"]


def test_a_sparse_home_of_terabytes_fills_no_disk(images: records.Images, assembled: Assembled) -> None:
    said = pax((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"%d" % (1 << 43)))
    made = assembled(tar(said, file(b"root/huge", b"x")))
    assert images.work_seed(made.id).stat().st_size < 100_000


def test_a_home_that_is_a_file_is_refused(assembled: Assembled, tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="/root of the image"):
        assembled(tar(file(b"root", b"x")))
    assert list((tmp_path / "images").iterdir()) == []


@pytest.mark.parametrize(
    "planted",
    [
        (symlink(b".banger", b"/etc"), directory(b"etc")),
        (directory(b".banger"), symlink(b".banger/guest", b"/usr/bin/su"), file(b".banger/config", b"evil")),
        (file(b".banger", b"x"),),
    ],
)
def test_what_an_image_plants_where_the_guest_binary_goes_is_gone(
    planted: tuple[bytes, ...], images: records.Images, assembled: Assembled, guest: Path
) -> None:
    made = assembled(SYSTEM, tar(*planted))
    rootfs = images.rootfs(made.id)
    assert ext4_read.content(rootfs, "/.banger/guest") == guest.read_bytes()
    assert not ext4.exists(rootfs, "/.banger/config")
    assert ext4_read.content(rootfs, "/usr/bin/su") == b"\x7fELF su"


def test_an_image_without_init_says_so(assembled: Assembled) -> None:
    assert (
        assembled(tar(file(b"hello", b"\x7fELF", mode=0o755), symlink(b"sbin", b"nowhere"))).has_init
        is False
    )


def test_a_size_of_ones_own(images: records.Images, assembled: Assembled) -> None:
    made = assembled(SYSTEM, size_bytes=64 * MIB)
    assert images.rootfs(made.id).stat().st_size == made.size_bytes == 64 * MIB
    ext4.check(images.rootfs(made.id))


def test_a_size_too_small_says_so(assembled: Assembled, tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="does not fit on a disk of 4 MiB") as caught:
        assembled(tar(file(b"big", bytes(range(1, 256)) * 40_000)), size_bytes=4 * MIB)
    assert "--size" in caught.value.hint
    assert list((tmp_path / "images").iterdir()) == []


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("free", [0, 256 * MIB + 3000, 256 * MIB + MIB], ids=["none", "layers", "content"])
def test_a_host_without_room_is_told_before_it_is_full(
    free: int, assembled: Assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A disk of a wanted fullness cannot be had without root.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, free))
    with pytest.raises(errors.NoSpaceError):
        assembled(tar(*(file(b"small%d" % number, b"x") for number in range(500))))
    assert list((tmp_path / "images").iterdir()) == []


def test_a_copy_of_an_image_leaves_the_host_room(
    images: records.Images, assembled: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = assembled(SYSTEM)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 0, 256 * MIB - 1))
    with pytest.raises(errors.NoSpaceError, match="no space left for the copy of") as caught:
        publish.promote(images, made, name="copy")
    assert caught.value.hint
    assert [image.id for image in images.records()] == [made.id]


def test_a_refused_layer_leaves_nothing(assembled: Assembled, tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="layer 2 of 2"):
        assembled(SYSTEM, tar(file(b"../escape", b"x")))
    assert list((tmp_path / "images").iterdir()) == []


def test_a_record_of_an_older_version_is_read(images: records.Images, assembled: Assembled) -> None:
    made = assembled(SYSTEM)
    path = images.path(made.id) / records.RECORD
    old = msgspec.json.decode(path.read_bytes())
    for key in ("reference", "digest", "layers", "run"):
        del old[key]
    path.write_bytes(msgspec.json.encode(old))
    assert images.read(made.id).run == bundle.RunConfig()


def test_an_image_made_elsewhere_is_registered(
    images: records.Images, assembled: Assembled, tmp_path: Path
) -> None:
    made = assembled(SYSTEM)
    elsewhere = records.Images(tmp_path / "elsewhere")
    moved = publish.register(elsewhere, images.path(made.id), name="moved")
    assert (moved.id, moved.name, moved.guest_sha256) == (made.id, "moved", made.guest_sha256)
    assert elsewhere.rootfs(moved.id).read_bytes() == images.rootfs(made.id).read_bytes()
    assert elsewhere.rootfs(moved.id).stat().st_blocks <= images.rootfs(made.id).stat().st_blocks + 16
    with pytest.raises(errors.AlreadyExistsError):
        publish.register(elsewhere, images.path(made.id))


def test_what_a_record_from_elsewhere_claims_is_not_believed(
    images: records.Images, assembled: Assembled, tmp_path: Path
) -> None:
    made = assembled(SYSTEM)
    path = images.path(made.id) / records.RECORD
    claims = {
        "created_at": "9999-12-31T00:00:00Z",
        "reference": ":::",
        "digest": made.digest,
        "tags": ("a:b",),
    }
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(made, **claims)))
    elsewhere = records.Images(tmp_path / "elsewhere")
    taken = publish.register(elsewhere, path.parent)
    assert made.created_at < taken.created_at < "9999"
    assert (taken.reference, taken.digest, taken.tags, taken.layers) == ("", "", (), ())
    assert taken.source == f"registered {path.parent}"


def test_a_record_larger_than_any_is_not_read(images: records.Images, tmp_path: Path) -> None:
    with (tmp_path / records.RECORD).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(errors.BadRequestError, match="which no record is"):
        publish.register(images, tmp_path)


def test_a_damaged_image_is_not_registered(
    images: records.Images, assembled: Assembled, tmp_path: Path
) -> None:
    made = assembled(SYSTEM)
    with images.rootfs(made.id).open("r+b") as file:
        file.seek(1024)
        file.write(bytes(64))
    elsewhere = records.Images(tmp_path / "elsewhere")
    with pytest.raises(errors.OperationFailedError):
        publish.register(elsewhere, images.path(made.id))
    assert elsewhere.records() == []
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_no_image_is_not_registered(images: records.Images, tmp_path: Path) -> None:
    with pytest.raises(errors.BadRequestError, match="not an image directory"):
        publish.register(images, tmp_path)


def test_an_image_directory_that_the_daemon_does_not_see_is_said(images: records.Images) -> None:
    with pytest.raises(errors.BadRequestError, match="not an image directory") as caught:
        publish.register(images, Path("/tmp/no-image"))
    assert "does not see the host's /tmp" in caught.value.hint


@pytest.mark.parametrize("part", [records.RECORD, records.ROOTFS, records.WORK_SEED])
def test_a_pipe_in_an_image_directory_is_not_waited_for(
    images: records.Images, assembled: Assembled, tmp_path: Path, part: str
) -> None:
    pipe = images.path(assembled(SYSTEM).id) / part
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(errors.BadRequestError, match=f"{part} is not a file"):
        publish.register(records.Images(tmp_path / "elsewhere"), pipe.parent)


def test_a_layer_that_changed_leaves_nothing(images: records.Images, guest: Path, tmp_path: Path) -> None:
    layer = tars.layer(tmp_path / "changed", SYSTEM)
    changed = dataclasses.replace(layer, diff_id=f"sha256:{'0' * 64}")
    with pytest.raises(errors.BadRequestError, match="and not sha256:000"):
        assemble.assemble(
            images,
            bundle.Bundle("", "", "x86_64", (changed,)),
            name="x",
            guest_binary=guest,
            kernel="k",
            headroom_mib=1,
        )
    assert list((tmp_path / "images").iterdir()) == []


@hypothesis.given(
    strategies.lists(
        strategies.tuples(strategies.integers(0, 60), strategies.binary(min_size=1, max_size=50))
    )
)
@hypothesis.settings(max_examples=25, deadline=None)
def test_sparse_copies_are_equal(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]
) -> None:
    directory = tmp_path_factory.mktemp("sparse")
    source = directory / "source"
    with source.open("wb") as file:
        file.truncate(1 << 20)
        for position, data in writes:
            file.seek(position * 16384)
            file.write(data)
    publish.copy_sparse(source, directory / "copy")
    assert (directory / "copy").read_bytes() == source.read_bytes()
