# SPDX-License-Identifier: MIT
"""A disk that fills up while an image is made: at any page that is said, and nothing stays.

The disk is a memory file system that has only so many pages left from the moment the work begins. What a
full disk does to a pull's layers is in `test_image_pull`, to a file system alone in `test_mkfs_mounted`.
"""

from __future__ import annotations

import gzip
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from banger import artefacts
from banger.contract import errors
from banger.images import assemble, bundle, publish, recipe, records, sources
from tests import oci_make

MIB: Final = 1 << 20
PAGE: Final = 4096


class SmallDisk:
    """Large until it is made small."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=1g", "tmpfs")
        (path / "other").write_bytes(b"of somebody else")  # a size of 0 would mean that there is no limit

    def leave(self, pages: int) -> None:
        """That many are left from now on. A size that somebody who writes has outgrown is refused."""
        for _ in range(100):
            found = os.statvfs(self.path)
            used = (found.f_blocks - found.f_bfree) * found.f_frsize
            try:
                return self._mount("-o", f"remount,size={used + pages * PAGE}")
            except subprocess.CalledProcessError as error:
                refused = error
        raise refused

    def enlarge(self) -> None:
        self._mount("-o", "remount,size=1g")

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, self.path], check=True, timeout=20)

    def files(self) -> set[str]:
        return {path.name for path in self.path.rglob("*") if path.is_file()}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """Used to its last page, as when others take at the same time what is kept free."""
    monkeypatch.setattr(artefacts, "RESERVE_BYTES", 0)
    made = SmallDisk(tmp_path / "small")
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", made.path], check=True, timeout=20)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small layer, with something for the work seed in it."""
    path = tmp_path_factory.mktemp("layers") / "layer.tar"
    path.write_bytes(oci_make.tar({"bin/app": os.urandom(20 * PAGE), "root/notes": os.urandom(5 * PAGE)}))
    return path


def _error(work: Callable[[int], None], pages: int) -> errors.NoSpaceError | None:
    try:
        work(pages)
    except errors.NoSpaceError as error:
        return error
    return None


def full_at_every_page(disk: SmallDisk, work: Callable[[int], None]) -> int:
    """Does the work with ever more pages left until they are enough; how often they were not."""
    for failed in range(200):
        error = _error(work, failed)
        if error is None:
            return failed
        assert error.hint
        assert disk.files() == {"other"}
        disk.enlarge()
    raise AssertionError("it was never enough")


def test_while_an_image_is_made(disk: SmallDisk, archive: Path, tmp_path: Path) -> None:
    """In its content, its seed, its tables, its record: as far as it came."""
    guest = tmp_path / "guest"
    guest.write_bytes(b"\x7fELF" * 100)
    layer = bundle.Layer(archive, bundle.Compression.NONE, "", archive.stat().st_size)
    images = records.Images(disk.path / "images")

    def make(pages: int) -> None:
        lines: list[str] = []

        def begun(line: str) -> None:
            if not lines:
                disk.leave(pages)
            lines.append(line)

        assemble.assemble(
            images,
            bundle.Bundle("", "", platform.machine(), (layer,)),
            name="made",
            guest_binary=guest,
            kernel="none",
            headroom_mib=1,
            on_line=begun,
        )

    assert full_at_every_page(disk, make) > 25
    assert [image.name for image in images.records()] == ["made"]


@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_while_an_archive_is_unpacked(disk: SmallDisk, archive: Path, tmp_path: Path, kind: str) -> None:
    layout = tmp_path / "layout"
    oci_make.layout(layout, "v1", [archive.read_bytes()])
    name = f"{tmp_path}/saved:app:v1" if kind == "docker-archive" else f"{tmp_path}/saved:v1"
    subprocess.run(["skopeo", "copy", "-q", f"oci:{layout}:v1", f"{kind}:{name}"], check=True, timeout=60)
    saved = tmp_path / "saved.gz"
    saved.write_bytes(gzip.compress((tmp_path / "saved").read_bytes(), 1))
    scratch = disk.path / "imports"

    def read(pages: int) -> None:
        disk.leave(pages)
        with sources.opened(saved, arch=platform.machine(), scratch=scratch) as found:
            assert found.layers

    assert full_at_every_page(disk, read) > 25
    assert list(scratch.iterdir()) == []


def test_while_an_image_is_copied(disk: SmallDisk, archive: Path, tmp_path: Path) -> None:
    guest = tmp_path / "guest"
    guest.write_bytes(b"\x7fELF" * 100)
    layer = bundle.Layer(archive, bundle.Compression.NONE, "", archive.stat().st_size)
    elsewhere, images = records.Images(tmp_path / "images"), records.Images(disk.path / "images")
    made = assemble.assemble(
        elsewhere,
        bundle.Bundle("", "", platform.machine(), (layer,)),
        name="made",
        guest_binary=guest,
        kernel="none",
        headroom_mib=1,
    )

    def register(pages: int) -> None:
        disk.leave(pages)
        publish.register(images, elsewhere.path(made.id))

    assert full_at_every_page(disk, register) > 25
    assert [image.id for image in images.records()] == [made.id]


@pytest.mark.timeout(180)
def test_while_packages_are_unpacked(disk: SmallDisk) -> None:
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if "extracting archives" in line:
            disk.leave(0)

    with pytest.raises(errors.NoSpaceError) as caught:
        _build(disk, hear)
    assert caught.value.hint, lines
    assert disk.files() == {"other"}


def test_too_little_room_for_packages_is_seen_before(disk: SmallDisk) -> None:
    disk.leave(100 * MIB // PAGE)
    with pytest.raises(errors.NoSpaceError, match="at the least") as caught:
        _build(disk, lambda line: None)
    assert "prune" in caught.value.hint
    assert disk.files() == {"other"}


def _build(disk: SmallDisk, on_line: Callable[[str], None]) -> None:
    arch, cache = platform.machine(), disk.path / "cache"
    recipe.base_archive(recipe.load("busybox"), arch=arch, cache_dir=cache, on_line=on_line)
