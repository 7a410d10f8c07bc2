# SPDX-License-Identifier: MIT
"""The seed takes no more of the host's disk than it was given, and what it holds comes out as it was."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies

from banger.contract import errors
from banger.images import seed
from banger.images.mkfs import filesystem
from tests.unit.tars import file, listing, put, tar

FILE = filesystem.Attributes(0o100644)
BLOCK = 4096


def _home(fs: filesystem.Filesystem) -> int:
    return fs.mkdir(fs.ROOT, b"root", filesystem.Attributes(0o40755))


def test_a_seed_ends_where_there_is_no_more_room(tmp_path: Path) -> None:
    archive = tmp_path / "seed.tar"
    with filesystem.Filesystem(tmp_path / "fs.ext4") as fs:
        put(fs, [tar(*(file(b"root/%d" % number, b"x") for number in range(200)))])
        home = fs.lookup(fs.ROOT, b"root") or 0
        with pytest.raises(errors.NoSpaceError, match=r"in /root does not fit into the 48\.8 KiB"):
            seed.pack(fs, home, archive, max_bytes=50_000)
    assert 1 <= archive.stat().st_size <= 50_000


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], max_examples=40)
@hypothesis.given(
    parts=strategies.lists(
        strategies.tuples(strategies.booleans(), strategies.integers(1, 3 * BLOCK)), max_size=6
    )
)
def test_files_with_holes_come_out_as_they_went_in(parts: list[tuple[bool, int]], tmp_path: Path) -> None:
    archive = tmp_path / "seed.tar"
    archive.unlink(missing_ok=True)
    content = [filesystem.Hole(length) if hole else b"x" * length for hole, length in parts]
    with (
        filesystem.Filesystem(tmp_path / "fs.ext4") as fs,
        filesystem.Filesystem(tmp_path / "b.ext4") as out,
    ):
        home = _home(fs)
        fs.write(home, b"some", FILE, content)
        fs.write(home, b"after", FILE, [b"more"])
        seed.pack(fs, home, archive, max_bytes=1 << 20)
        put(out, [archive.read_bytes()])
        wanted = {name.removeprefix(b"root/"): said for name, said in listing(fs).items() if b"/" in name}
        assert listing(out) == wanted


def test_attributes_whose_names_are_no_text_come_out_as_they_went_in(tmp_path: Path) -> None:
    archive = tmp_path / "seed.tar"
    odd = filesystem.Attributes(0o100644, xattrs=((b"user.\xff\xfe", b"\xff"), (b"user.plain", b"x")))
    with (
        filesystem.Filesystem(tmp_path / "fs.ext4") as fs,
        filesystem.Filesystem(tmp_path / "b.ext4") as out,
    ):
        home = _home(fs)
        fs.write(home, b"some", odd, [])
        seed.pack(fs, home, archive, max_bytes=1 << 20)
        put(out, [archive.read_bytes()])
        found = out.lookup(out.ROOT, b"some")
        assert found is not None
        assert sorted(out.attributes(found).xattrs) == sorted(odd.xattrs)


def test_a_path_that_nobody_could_read_again_is_refused_with_its_image(tmp_path: Path) -> None:
    """Links in an archive lead to longer paths than any of its names."""
    with filesystem.Filesystem(tmp_path / "fs.ext4") as fs:
        home = directory = _home(fs)
        for _ in range(17):
            directory = fs.mkdir(directory, b"d" * 250, filesystem.Attributes(0o40755))
        with pytest.raises(errors.BadRequestError, match="/root has a path longer than 4096 bytes"):
            seed.pack(fs, home, tmp_path / "seed.tar", max_bytes=1 << 20)
