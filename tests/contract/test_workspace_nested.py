# SPDX-License-Identifier: MIT
"""Work in repositories inside a workspace: it comes out too, or what would stay behind is named."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from banger import archive
from banger.contract import errors
from banger.workspace import copying
from banger.workspace import repository as found
from tests.contract import repositories, workspaces

Guest = workspaces.Guest
git = repositories.git
PULL = ("vm", "workspace", "pull", "web")


def commit_of(where: Path, name: str) -> str:
    return git(where, "rev-parse", "-q", "--verify", name, check=False).decode().strip()


async def copied(guest: Guest) -> Path:
    """The submodule in the guest."""
    repositories.with_submodule(guest.source)
    await guest.prepare("--mode", "full-copy")
    return guest.repo / "libs" / "below"


def work(below: Path) -> None:
    (below / "README").write_text("committed in the submodule\n")
    repositories.commit(below, "in the submodule")
    (below / "src" / "data.bin").write_bytes(os.urandom(5000))
    (below / "new").write_text("new\n")


async def test_work_in_a_submodule_alone_is_pulled_into_the_submodule_here(guest: Guest) -> None:
    below = await copied(guest)
    assert "nothing was changed" in (await guest.banger(*PULL, status=1)).err
    (below / "README").write_text("uncommitted\n")
    done = await guest.banger(*PULL, "--json")
    here = guest.source / "libs" / "below"
    assert git(here, "show", "banger/web:README") == b"uncommitted\n"
    (inner,) = done.json["nested"]
    assert (inner["path"], inner["commits"]) == ("libs/below", 1)
    assert commit_of(guest.source, "banger/web") == commit_of(guest.source, "main")


async def test_commits_in_a_submodule_land_before_the_commit_that_names_them(guest: Guest) -> None:
    below = await copied(guest)
    work(below)
    (guest.repo / "README").write_text("above\n")
    repositories.commit(guest.repo, "above")
    done = await guest.banger(*PULL)
    assert "libs/below" in done.err
    here = guest.source / "libs" / "below"
    assert git(guest.source, "show", "banger/web:README") == b"above\n"
    named = commit_of(guest.source, "banger/web:libs/below")
    assert named == commit_of(below, "HEAD")
    assert git(here, "log", "--format=%s", "-1", named) == b"in the submodule\n"
    names = [b"README", b"src/data.bin", b"new"]
    git(here, "checkout", "-q", "banger/web")
    assert repositories.tree(here, names) == repositories.tree(below, names)
    assert git(here, "fsck", "--no-dangling") == git(guest.source, "fsck", "--no-dangling") == b""


async def test_a_patch_holds_the_work_in_a_submodule(guest: Guest) -> None:
    below = await copied(guest)
    work(below)
    (guest.repo / "README").write_text("above\n")
    patch = (await guest.banger("vm", "workspace", "export", "web")).out
    assert (await guest.banger("vm", "workspace", "diff", "web")).out == patch
    git(guest.source, "apply", stdin=patch)
    names = [b"README", *(b"libs/below/" + name for name in (b"README", b"src/data.bin", b"new"))]
    assert repositories.tree(guest.source, names) == repositories.tree(guest.repo, names)


def made_inside(repo: Path) -> Path:
    inner = repo / "vendor"
    inner.mkdir()
    git(inner, "init", "-q")
    (inner / "tool").write_text("tool\n")
    return inner


async def test_a_repository_made_in_the_guest_is_named_and_comes_where_one_is(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    repositories.commit(made_inside(guest.repo))
    refused = await guest.banger(*PULL, status=1)
    assert "vendor in web is a repository of its own" in refused.err
    assert commit_of(guest.source, "banger/web") == ""
    patch = (await guest.banger("vm", "workspace", "export", "web")).out
    git(guest.source, "apply", stdin=patch)
    assert (guest.source / "vendor" / "tool").read_text() == "tool\n"
    git(guest.source, "init", "-q", "vendor")
    await guest.banger(*PULL)
    assert git(guest.source / "vendor", "show", "banger/web:tool") == b"tool\n"
    assert commit_of(guest.source, "banger/web:vendor") == commit_of(guest.source / "vendor", "banger/web")


async def test_what_cannot_come_out_is_named(guest: Guest) -> None:
    below = await copied(guest)
    made_inside(below)
    for words in (PULL, ("vm", "workspace", "export", "web"), ("vm", "workspace", "diff", "web")):
        assert (
            "vendor is a repository of its own without a commit"
            in (await guest.banger(*words, status=1)).err
        )
    repositories.commit(below / "vendor")
    assert "vendor in web is a repository of its own" in (await guest.banger(*PULL, status=1)).err
    os.rename(below / ".git", below / "elsewhere")
    for words in (PULL, ("vm", "workspace", "export", "web")):
        assert "libs/below holds files" in (await guest.banger(*words, status=1)).err


async def test_a_clone_in_the_guest_that_was_not_touched_holds_up_nothing(
    guest: Guest, tmp_path: Path
) -> None:
    repositories.plain(guest.source)
    repositories.plain(tmp_path / "other")
    await guest.prepare()
    git(guest.repo, "submodule", "add", "-q", str(tmp_path / "other"), "other")
    done = await guest.banger(*PULL)
    assert "other" in done.err
    assert commit_of(guest.source, "banger/web:other") == commit_of(tmp_path / "other", "HEAD")
    (guest.repo / "other" / "README").write_text("work\n")
    assert "other in web is a repository of its own" in (await guest.banger(*PULL, status=1)).err


async def test_work_that_is_not_checked_out_is_named(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    git(guest.repo, "checkout", "-q", "-b", "mine")
    repositories.commit(guest.repo, "in a branch")
    git(guest.repo, "checkout", "-q", "main")
    (guest.repo / "README").write_text("stashed\n")
    git(guest.repo, "stash")
    refused = await guest.banger(*PULL, status=1)
    assert "there is work in mine, stash" in refused.err
    assert "other" not in refused.err, "a branch that came from here"
    (guest.repo / "README").write_text("more\n")
    done = await guest.banger(*PULL)
    assert "not brought: mine, stash" in done.err
    git(guest.repo, "checkout", "-q", "-f", "mine")
    assert "mine" not in (await guest.banger(*PULL, "--branch", "mine-here")).err.partition("stash")[0]


async def test_commits_in_a_full_copy_come_out(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare("--mode", "full-copy")
    (guest.repo / "README").write_text("committed\n")
    repositories.commit(guest.repo, "in the copy")
    assert b"+committed" in (await guest.banger("vm", "workspace", "diff", "web")).out
    await guest.banger(*PULL)
    assert git(guest.source, "log", "--format=%s", "main..banger/web") == b"in the copy\n"


async def test_another_repository_of_the_guest_comes_out_whole(guest: Guest, tmp_path: Path) -> None:
    """Where banger never was, nothing says since when there is work."""
    repositories.plain(guest.source)
    repositories.plain(tmp_path / "other")
    repositories.commit(tmp_path / "other", "in the guest")
    await guest.prepare()
    await guest.banger(*PULL, "--guest-path", str(tmp_path / "other"), "--branch", "other-work")
    assert commit_of(guest.source, "other-work") == commit_of(tmp_path / "other", "HEAD")


async def test_a_full_copy_of_a_linked_working_tree_comes_out(guest: Guest) -> None:
    repositories.linked(guest.source)
    (guest.source / "staged").write_text("staged\n")
    git(guest.source, "add", "staged")
    await guest.prepare("--mode", "full-copy")
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    log = ("log", "--all", "--format=%H %D", "--decorate=full")
    assert git(guest.repo, *log) == git(guest.source, *log)
    assert git(guest.repo, "fsck", "--no-dangling") == b""
    (guest.repo / "more").write_text("more\n")
    repositories.commit(guest.repo, "more")
    await guest.banger(*PULL)
    assert commit_of(guest.source, "banger/web") == commit_of(guest.repo, "HEAD")


async def test_a_linked_working_tree_that_cannot_be_copied_whole_is_refused(guest: Guest) -> None:
    above = guest.source.with_name("above")
    repositories.with_submodule(above)
    git(above, "worktree", "add", "-q", "-b", "feature", str(guest.source))
    git(guest.source, "submodule", "update", "--init", "-q")
    refused = await guest.prepare("--mode", "full-copy", status=2)
    assert "libs/below" in refused.err
    assert not guest.repo.exists()
    inner = ("vm", "workspace", "prepare", "web", str(above / "libs" / "below"), "--mode", "full-copy")
    assert "of another tree" in (await guest.banger(*inner, status=2)).err
    git(above.parent, "clone", "-q", "--bare", str(above), "bare")
    linked = guest.source.with_name("linked")
    git(above.with_name("bare"), "worktree", "add", "-q", "-b", "other-feature", str(linked))
    words = ("vm", "workspace", "prepare", "web", str(linked))
    assert "bare" in (await guest.banger(*words, "--mode", "full-copy", status=2)).err


@pytest.mark.parametrize("borrower", ["", "libs/below"])
async def test_a_repository_that_borrows_objects_cannot_be_copied_whole(guest: Guest, borrower: str) -> None:
    repositories.with_submodule(guest.source)
    here, lender = guest.source / borrower, guest.source.with_name("lender")
    git(here, "clone", "-q", "--bare", str(here), str(lender))
    place = git(here, "rev-parse", "--git-path", "objects/info/alternates").decode().strip()
    (here / place).write_text(f"{lender}/objects\n")
    git(here, "repack", "-q", "-a", "-d", "-l")
    refused = await guest.prepare("--mode", "full-copy", status=2)
    assert f"{here} borrows objects" in refused.err
    assert f"git -C {here} repack -a -d" in refused.err
    git(here, "repack", "-q", "-a", "-d")
    (here / place).unlink()
    await guest.prepare("--mode", "full-copy")
    assert git(guest.repo / borrower, "fsck", "--no-dangling") == b""


def test_hooks_stay_here_and_what_is_only_called_so_goes_along(tmp_path: Path) -> None:
    """A branch, a remote's branch, a submodule."""
    here, there, outside = tmp_path / "here", tmp_path / "there", tmp_path / "outside"
    repositories.plain(outside)
    repositories.plain(here)
    git(here, "submodule", "add", "-q", str(outside), "hooks")
    git(here, "switch", "-q", "-c", "hooks")
    repositories.commit(here)
    git(here, "update-ref", "refs/remotes/origin/hooks", "HEAD")
    git(here, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/hooks")
    for hooks in (here / ".git" / "hooks", here / ".git" / "modules" / "hooks" / "hooks"):
        hooks.mkdir(exist_ok=True)
        (hooks / "pre-commit").write_text("#!/bin/sh\n")
    copy = copying.take(found.find(here), include_untracked=False)
    there.mkdir()
    subprocess.run(["tar", "-xC", str(there)], input=b"".join(archive.packed(copy.members())), check=True)
    for name in ("HEAD", "refs/remotes/origin/hooks"):
        assert commit_of(there, name) == commit_of(here, name)
    assert git(there, "status", "--porcelain") == b""
    assert git(there / "hooks", "status", "--porcelain") == b""
    assert not [*there.rglob("pre-commit")]


def test_a_guest_names_no_repository_outside(tmp_path: Path) -> None:
    repositories.plain(tmp_path / "top")
    repositories.plain(tmp_path / "outside")
    (tmp_path / "top" / "leads-out").symlink_to(tmp_path / "outside")
    top = found.find(tmp_path / "top")
    for path in ("../outside", "/etc", "a/../../outside", ".", "", "src//x", ".git"):
        with pytest.raises(errors.ProtocolError):
            found.inside(top, path)
    assert found.inside(top, "leads-out") is None
    assert found.inside(top, "src") is None
    git(tmp_path / "top", "init", "-q", "inner")
    inner = found.inside(top, "inner")
    assert inner is not None
    assert inner.top == tmp_path / "top" / "inner"
