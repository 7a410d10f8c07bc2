# SPDX-License-Identifier: MIT
"""What a new owner is given of an old one's, whose processes may go on and put other files there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from banger.system import install

OLD, NEW = 64_242, 64_243


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """With a file, a directory and a link of the old owner's, beside what is root's."""
    secret, top = tmp_path / "secret", tmp_path / "state"
    secret.write_text("root's\n")
    (top / "vms").mkdir(parents=True)
    (top / "vms/disk").write_text("a disk\n")
    (top / "link").symlink_to(secret)
    (top / "roots").write_text("root's\n")
    for path in (top, top / "vms", top / "vms/disk", top / "link"):
        os.chown(path, OLD, OLD, follow_symlinks=False)
    return top


def _owner(path: Path) -> int:
    return path.lstat().st_uid


def test_all_of_the_old_owner_s_and_nothing_else(state: Path) -> None:
    install._hand_over(state, NEW, NEW)
    assert [_owner(state / name) for name in ("vms", "vms/disk", "link")] == [NEW] * 3
    assert [_owner(state / name) for name in ("roots", "../secret")] == [0, 0]


def test_another_file_in_its_place_stays_whose_it_is(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hard link, which hosts with `fs.protected_hardlinks=0` let everybody make."""
    disk, really = state / "vms/disk", os.fstat

    def looked_at(descriptor: int) -> os.stat_result:
        found = really(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(disk):
            disk.unlink()
            os.link(state / "../secret", disk)
        return found

    monkeypatch.setattr(os, "fstat", looked_at)
    install._hand_over(state, NEW, NEW)
    monkeypatch.undo()
    assert disk.read_text() == "root's\n", "it was put there"
    assert _owner(disk) == 0
