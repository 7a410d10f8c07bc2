# SPDX-License-Identifier: MIT
"""Commits in a VM are its owner's: git's identity on a new work disk, as git itself reads it there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger.owner import composition, identity
from banger.storage import workdisk
from tests import ext4_read
from tests.contract import conftest
from tests.unit import tars

NAME = 'Ada "the \\ first" Ünal; #1'


def git(home: Path, *words: str, cwd: Path | None = None) -> str:
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        ["git", *words], cwd=cwd or home, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The owner's, who has told git who they are."""
    made = tmp_path / "home"
    made.mkdir()
    git(made, "config", "--global", "user.name", NAME)
    git(made, "config", "--global", "user.email", "ada@example.org")
    return made


@pytest.fixture
def owned(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's owner has that home."""
    monkeypatch.setattr(composition, "_home", lambda: home)


@pytest.mark.usefixtures("owned")
async def test_a_commit_anywhere_in_a_new_vm_is_its_owners(daemon: conftest.Daemon, tmp_path: Path) -> None:
    vm = (await daemon.create()).vm
    assert vm is not None
    disk = daemon.paths.state / "vms" / vm.id / "work.ext4"
    root = tmp_path / "root"
    (root / ".config/git").mkdir(parents=True)
    (root / ".config/git/config").write_bytes(ext4_read.content(disk, "/.config/git/config"))
    commit = ("commit", "-q", "--allow-empty", "-m", "x")
    for name in ("anything", "else"):
        git(root, "init", "-q", name)
        git(root, *commit, cwd=root / name)
        who = git(root, "log", "-1", "--format=%an <%ae>", cwd=root / name)
        assert who == f"{NAME} <ada@example.org>"
    (root / ".gitconfig").write_text("[user]\nname = Brought\n")
    git(root, *commit, cwd=root / "else")
    who = git(root, "log", "-1", "--format=%an <%ae>", cwd=root / "else")
    assert who == "Brought <ada@example.org>", "what an image or file_sync brings counts more"


def test_who_the_owner_is_comes_from_what_git_knows_of_the_home(home: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ".gitconfig").write_bytes(identity.git_config(home))
    assert (git(copy, "config", "user.name"), git(copy, "config", "user.email")) == (NAME, "ada@example.org")
    (home / "work").write_text("[user]\nname = Included\n[alias]\nx = !touch /tmp/x\n")
    git(home, "config", "--global", "include.path", str(home / "work"))
    (copy / ".gitconfig").write_bytes(identity.git_config(home))
    assert git(copy, "config", "user.name") == "Included"
    assert git(copy, "config", "--get-regexp", ".").count("\n") == 1, "and nothing else"


@pytest.mark.parametrize("said", [None, "", "[core]\neditor = vi\n", "[user\n", "[user]\nname\n"])
def test_of_an_owner_whom_git_does_not_know_nothing_is_said(tmp_path: Path, said: str | None) -> None:
    if said is not None:
        (tmp_path / ".gitconfig").write_text(said)
    assert identity.git_config(tmp_path) == b""


@pytest.mark.parametrize("there", ["/.config/git/config", "/.config", "/.config/git"])
def test_what_the_image_has_there_stays(tmp_path: Path, there: str) -> None:
    (tmp_path / "seed.tar").write_bytes(tars.tar(tars.file(there.removeprefix("/").encode(), b"its own")))
    workdisk.create(
        tmp_path / "work.ext4", size_mib=16, seed=tmp_path / "seed.tar", git_config=b"[user]\nname = Ada\n"
    )
    assert ext4_read.content(tmp_path / "work.ext4", there) == b"its own"
