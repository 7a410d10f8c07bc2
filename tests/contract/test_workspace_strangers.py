# SPDX-License-Identifier: MIT
"""A repository that a stranger packed up, with its `.git`: what it says of this host is not believed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from banger import archive
from banger.contract import errors
from banger.workspace import copying, repository, snapshot
from tests.contract import repositories
from tests.contract.repositories import git

OF_THE_USER = "the user's own key"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of a user, who has unpacked something in it."""
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "key").write_text(OF_THE_USER)
    repositories.plain(tmp_path / "unpacked")
    return tmp_path


def track(where: Path, path: str) -> None:
    """In the index, as if it were a file there."""
    blob = git(where, "rev-parse", "HEAD:README").decode().strip()
    git(where, "update-index", "--add", "--cacheinfo", f"100644,{blob},{path}")


def test_files_that_lie_elsewhere_are_not_its_own(home: Path) -> None:
    where = home / "unpacked"
    track(where, ".ssh/key")
    git(where, "config", "core.worktree", str(home))
    for path in (where, where / "src"):
        with pytest.raises(errors.BadRequestError, match="says that its files are in"):
            repository.find(path)
    git(home, "init", "-q")  # the user's own repository, of other files
    with pytest.raises(errors.BadRequestError, match="says that its files are in"):
        repository.find(where)


def test_what_lies_behind_a_link_is_not_copied(home: Path) -> None:
    where = home / "unpacked"
    (where / "keys").symlink_to(home / ".ssh")
    track(where, "keys/key")
    track(where, "keys/deeper/key")
    found = repository.find(where)
    copy = copying.take(found, include_untracked=True)
    assert OF_THE_USER.encode() not in b"".join(archive.packed(copy.members()))
    git(where, "update-index", "--skip-worktree", "keys/key")
    with snapshot.scratch(found) as scratch:
        assert not [path for path in scratch.take().files if path.startswith(b"keys/")]


@pytest.mark.parametrize("path", ["../.ssh/key", "/proc/version", "src/../../.ssh/key", ".git/description"])
def test_an_index_that_git_would_not_write_names_nothing_of_this_host(home: Path, path: str) -> None:
    where = home / "unpacked"
    stand_in = "x" * len(path)
    before = copying.take(repository.find(where), include_untracked=False)
    track(where, stand_in)
    index = where / ".git" / "index"
    data = index.read_bytes()[:-20].replace(stand_in.encode(), path.encode())
    index.write_bytes(data + hashlib.sha1(data, usedforsecurity=False).digest())
    copy = copying.take(repository.find(where), include_untracked=False)
    assert copy.files == before.files


@pytest.mark.parametrize("name", ["index", "sharedindex.x", "info/exclude", "shallow"])
@pytest.mark.parametrize("what", ["device", "pipe", "directory"])
def test_what_is_no_file_is_not_read(home: Path, name: str, what: str) -> None:
    """A device would be read until memory or the disk is full, a pipe for ever."""
    path = home / "unpacked" / ".git" / name
    path.unlink(missing_ok=True)
    if what == "device":
        path.symlink_to("/dev/null")  # any would do, and this one ends
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    found = repository.find(home / "unpacked")
    with snapshot.scratch(found) as scratch:
        assert bool(scratch.entries()) == (name != "index")
        assert not (scratch.directory / name).exists()


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://ada:pass@word@example.org/x", "https://example.org/x"),
        ("https://ada:pass@example.org/@x", "https://example.org/@x"),
        ("https::https://token@example.org/x", "https::https://example.org/x"),
        ("ftp://ada:pass@example.org/x", "ftp://example.org/x"),
        ("git@example.org:x", "git@example.org:x"),
        ("ssh://git@example.org/x", "ssh://git@example.org/x"),
    ],
)
def test_no_password_of_a_remote_leaves(home: Path, url: str, sent: str) -> None:
    git(home / "unpacked", "config", "remote.origin.url", url)
    assert repository.find(home / "unpacked").guest_config["remote.origin.url"] == sent
