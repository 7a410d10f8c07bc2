# SPDX-License-Identifier: MIT
"""A guest's work out again: exact, as a patch or a branch, whatever the guest sends instead."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.contract import cli_process, repositories, workspaces

Guest = workspaces.Guest
git = repositories.git


async def export(guest: Guest, *options: str) -> bytes:
    return (await guest.banger("vm", "workspace", "export", "web", *options)).out


def work_in_guest(repo: Path) -> None:
    (repo / "README").write_text("committed in the guest\n")
    repositories.commit(repo, "in the guest")
    (repo / "src" / "data.bin").write_bytes(os.urandom(50_000))
    (repo / "new \udcff\n").write_bytes(b"\0\1\2")
    (repo / "tool").write_text("#!/bin/sh\n")
    (repo / "tool").chmod(0o755)
    (repo / "link").unlink()
    (repo / "link").symlink_to("tool")
    git(repo, "mv", "src/tool.sh", "renamed.sh")
    (repo / "ignored.log").write_text("no\n")


async def test_an_export_is_exact_and_leaves_the_guest_alone(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    work_in_guest(guest.repo)
    index = (guest.repo / ".git" / "index").read_bytes()
    objects = sorted(os.walk(guest.repo / ".git"))
    patch = await export(guest)
    assert (guest.repo / ".git" / "index").read_bytes() == index
    assert sorted(os.walk(guest.repo / ".git")) == objects
    assert b"GIT binary patch" in patch
    git(guest.source, "apply", "--index", stdin=patch)
    names = [
        b"README",
        b"src/data.bin",
        "new \udcff\n".encode(errors="surrogateescape"),
        b"tool",
        b"link",
        b"renamed.sh",
    ]
    assert repositories.tree(guest.source, names) == repositories.tree(guest.repo, names)
    assert not (guest.source / "src" / "tool.sh").exists()
    assert not (guest.source / "ignored.log").exists()


def everything(repo: Path) -> str:
    """The tree of all files that are not ignored, by git's own means; the index stays as it is."""
    index = repo / ".git" / "index"
    before = index.read_bytes() if index.exists() else None
    git(repo, "add", "-A")
    made = git(repo, "write-tree").decode().strip()
    index.unlink()
    if before is not None:
        index.write_bytes(before)
    return made


def change_anything(repo: Path) -> None:
    """One of each kind of change, in whatever files there are."""
    raw = os.fsencode(repo)
    files = [name for name in repositories.tracked(repo) if os.path.isfile(os.path.join(raw, name))]
    for name in files[:1]:
        with open(os.path.join(raw, name), "ab") as file:
            file.write(b"\r\nguest\n\xff")
    for name in files[1:2]:
        os.unlink(os.path.join(raw, name))
    with open(os.path.join(raw, b"new \xff\n"), "wb") as file:
        file.write(b"\0\1\2")
    os.chmod(os.path.join(raw, b"new \xff\n"), 0o700)
    (repo / "to-new").symlink_to("nowhere/ü")


@pytest.mark.parametrize("state", sorted(repositories.STATES.keys() - {"assumed"}))
async def test_the_guest_s_work_lands_exactly_whatever_the_repository(guest: Guest, state: str) -> None:
    repositories.STATES[state](guest.source)
    await guest.prepare()
    change_anything(guest.repo)
    wanted = everything(guest.repo)
    await guest.banger("vm", "workspace", "pull", "web")
    assert git(guest.source, "rev-parse", "banger/web^{tree}").decode().strip() == wanted
    assert git(guest.source, "fsck", "--no-dangling") == b""


PULL = ("vm", "workspace", "pull", "web")


async def test_what_git_is_told_not_to_look_at_comes_out_when_it_was_changed_there(guest: Guest) -> None:
    repositories.assumed(guest.source)
    await guest.prepare()
    (guest.repo / "more").write_text("more\n")
    await guest.banger(*PULL)
    assert git(guest.source, "diff", "--name-only", "main..banger/web") == b"more\n"
    (guest.repo / "README").write_text("work\n")
    await guest.banger(*PULL, "--force")
    assert git(guest.source, "show", "banger/web:README") == b"work\n"
    (guest.repo / "README").unlink()
    await guest.banger(*PULL, "--force")
    assert b"README" not in git(guest.source, "ls-tree", "--name-only", "banger/web")


async def test_a_file_that_is_no_part_of_a_sparse_checkout_comes_out_when_it_was_made_there(
    guest: Guest,
) -> None:
    repositories.sparse(guest.source)
    await guest.prepare()
    (guest.repo / "src").mkdir()
    (guest.repo / "src" / "tool.sh").write_text("work\n")
    await guest.banger(*PULL)
    assert git(guest.source, "diff", "--name-only", "main..banger/web") == b"src/tool.sh\n"


async def test_content_that_a_filter_made_does_not_replace_what_git_keeps_of_it(guest: Guest) -> None:
    repositories.fetched(guest.source)
    pointer = git(guest.source, "rev-parse", "main:pointer.big")
    await guest.prepare()
    (guest.repo / "README").write_text("work\n")
    await guest.banger(*PULL)
    assert git(guest.source, "diff", "--name-only", "main..banger/web") == b"README\n"
    repositories.commit(guest.repo, "as agents do")
    assert git(guest.repo, "diff", "--name-only", "HEAD~1..HEAD") == b"README\n"
    git(guest.repo, "update-index", "--no-assume-unchanged", "pointer.big")
    repositories.commit(guest.repo, "all the same")
    await guest.banger(*PULL, "--force")
    assert git(guest.source, "rev-parse", "banger/web:pointer.big") == pointer


@pytest.mark.parametrize("mode", ["history", "full-copy"])
async def test_work_on_what_a_filter_made_is_named_and_refused(guest: Guest, mode: str) -> None:
    repositories.fetched(guest.source)
    pointer = git(guest.source, "rev-parse", "main:pointer.big")
    await guest.prepare("--mode", mode)
    git(guest.repo, "config", "--unset", "filter.lfs.clean", check=False)
    (guest.repo / "README").write_text("work\n")
    await guest.banger(*PULL)
    assert git(guest.source, "diff", "--name-only", "main..banger/web") == b"README\n"
    (guest.repo / "pointer.big").write_bytes(b"work")
    for words in (PULL, ("vm", "workspace", "export", "web")):
        assert "pointer.big needs a filter" in (await guest.banger(*words, status=1)).err
    git(guest.repo, "checkout", "HEAD", "--", "pointer.big")
    await guest.banger(*PULL, "--force")
    assert git(guest.source, "rev-parse", "banger/web:pointer.big") == pointer
    (guest.repo / "new.big").write_bytes(b"new")
    assert "new.big needs a filter" in (await guest.banger(*PULL, status=1)).err


async def test_an_export_against_a_commit(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    assert await export(guest) == b""
    base = git(guest.source, "rev-parse", "HEAD~1").decode().strip()
    patch = await export(guest, "--base-commit", base)
    assert b"+again" in patch
    wrong = await guest.banger("vm", "workspace", "export", "web", "--base-commit", "nothing", status=1)
    assert "no commit nothing" in wrong.err


async def test_an_export_to_a_file_and_a_diff_for_reading(guest: Guest, tmp_path: Path) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "README").write_text("\x1b]0;owned\x07\n")
    await export(guest, "-o", str(tmp_path / "work.patch"))
    assert b"owned" in (tmp_path / "work.patch").read_bytes()
    shown = await guest.banger("vm", "workspace", "diff", "web")
    assert shown.out == (tmp_path / "work.patch").read_bytes()


async def test_the_guest_s_work_lands_as_a_branch(guest: Guest) -> None:
    repositories.dirty(guest.source)
    await guest.prepare()
    before = (repositories.status(guest.source, untracked=True), (guest.source / ".git/index").read_bytes())
    work_in_guest(guest.repo)
    state = (repositories.status(guest.repo), (guest.repo / ".git/index").read_bytes())
    pulled = await guest.banger("vm", "workspace", "pull", "web")
    assert pulled.text == "banger/web\n"
    assert (repositories.status(guest.repo), (guest.repo / ".git/index").read_bytes()) == state
    after = (repositories.status(guest.source, untracked=True), (guest.source / ".git/index").read_bytes())
    assert after == before
    subjects = git(guest.source, "log", "--format=%s", "main..banger/web").decode().splitlines()
    assert subjects == ["Work in progress in web", "in the guest"]
    assert git(guest.source, "show", "banger/web:src/data.bin") == (guest.repo / "src/data.bin").read_bytes()
    assert git(guest.source, "fsck", "--full", "--no-dangling") == b""


async def test_pulling_again_goes_forward_or_is_refused(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    pull = ("vm", "workspace", "pull", "web")
    assert "nothing was changed" in (await guest.banger(*pull, status=1)).err
    empty = await guest.banger("vm", "workspace", "export", "web")
    assert (empty.out, "nothing was changed in web" in empty.err) == (b"", True)
    (guest.repo / "one").write_text("1")
    repositories.commit(guest.repo, "one")
    await guest.banger(*pull)
    (guest.repo / "two").write_text("2")
    repositories.commit(guest.repo, "two")
    await guest.banger(*pull)
    assert git(guest.source, "rev-parse", "banger/web") == git(guest.repo, "rev-parse", "HEAD")
    git(guest.repo, "commit", "-q", "--amend", "-m", "two, again")
    assert "not built on" in (await guest.banger(*pull, status=1)).err
    await guest.banger(*pull, "--force")
    git(guest.source, "checkout", "-q", "banger/web")
    assert "is checked out" in (await guest.banger(*pull, "--force", status=1)).err
    await guest.banger(*pull, "--branch", "other-name")


async def test_a_branch_that_stands_for_the_one_we_are_on_does_not_move_that(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "one").write_text("1")
    git(guest.source, "symbolic-ref", "refs/heads/banger/web", "refs/heads/main")
    before = git(guest.source, "rev-parse", "HEAD")
    await guest.banger("vm", "workspace", "pull", "web")
    assert git(guest.source, "rev-parse", "HEAD") == before
    assert git(guest.source, "show", "banger/web:one") == b"1"


async def test_pulling_says_in_which_repository_the_branch_is(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clone of it is another one, where `git merge` would find nothing."""
    repositories.plain(guest.source)
    await guest.prepare()
    work_in_guest(guest.repo)
    git(tmp_path, "clone", "-q", str(guest.source), "clone")
    for here in (tmp_path, tmp_path / "clone"):
        monkeypatch.chdir(here)
        said = (await guest.banger("vm", "workspace", "pull", "web")).err
        assert f", in {guest.source}; take them in with `git -C {guest.source} merge banger/web`" in said
    monkeypatch.chdir(guest.source)
    said = (await guest.banger("vm", "workspace", "pull", "web")).err
    assert "take them in with `git merge banger/web`" in said


async def test_pulling_into_another_repository_is_refused(guest: Guest, tmp_path: Path) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "one").write_text("1")
    # One that is made alike in the same second would have the same commits.
    repositories.unborn(tmp_path / "stranger")
    repositories.commit(tmp_path / "stranger", "not the same")
    words = ("vm", "workspace", "pull", "web", str(tmp_path / "stranger"))
    assert "does not have commit" in (await guest.banger(*words, status=1)).err


async def test_what_was_made_before_the_first_commit_lands(guest: Guest) -> None:
    repositories.unborn(guest.source)
    await guest.prepare()
    (guest.repo / "more").write_text("m")
    patch = await export(guest)
    assert b"+++ b/more" in patch
    assert b"+++ b/staged" in patch
    await guest.banger("vm", "workspace", "pull", "web")
    assert git(guest.source, "show", "banger/web:more") == b"m"


async def test_a_file_larger_than_memory_comes_out(guest: Guest) -> None:
    """Nobody here may hold it: the client and its git get less address space than it has bytes."""
    size = 160 << 20
    repositories.plain(guest.source)
    await guest.prepare()
    with (guest.repo / "large").open("wb") as file:
        file.truncate(size)
    run = cli_process.Cli(guest.served.path).run
    done = await asyncio.to_thread(run, *PULL, memory_bytes=size * 3 // 4)
    assert done.status == 0, done.err
    assert git(guest.source, "cat-file", "-s", "banger/web:large") == b"%d\n" % size


def hostile_tree(repo: Path, name: str) -> str:
    """A commit whose tree git would never make."""
    blob = git(repo, "hash-object", "-w", "--stdin", stdin=b"#!/bin/sh\ntouch /tmp/owned\n").decode().strip()
    mode, target = ("120000", blob) if name == ".gitmodules" else ("100755", blob)
    if "/" in name:
        outer, inner = name.split("/")
        below = git(repo, "mktree", stdin=f"{mode} blob {target}\t{inner}\n".encode()).decode().strip()
        entry = f"040000 tree {below}\t{outer}\n"
    else:
        entry = f"{mode} blob {target}\t{name}\n"
    raw = _raw_tree(entry)
    tree = git(repo, "hash-object", "-t", "tree", "-w", "--literally", "--stdin", stdin=raw).decode().strip()
    return git(repo, "commit-tree", tree, "-p", "HEAD", "-m", "hostile").decode().strip()


def _raw_tree(entry: str) -> bytes:
    head, name = entry.rstrip("\n").split("\t")
    mode, _, object_id = head.split(" ")
    return f"{mode.lstrip('0')} {name}".encode() + b"\0" + bytes.fromhex(object_id)


@pytest.mark.parametrize("name", [".git", ".GIT", "..", ".", ".git/hooks", ".gitmodules", "git~1"])
async def test_a_hostile_history_is_not_let_in(guest: Guest, name: str) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    git(guest.repo, "reset", "-q", "--soft", hostile_tree(guest.repo, name))
    before = sorted(os.walk(guest.source / ".git" / "hooks")), git(guest.source, "for-each-ref")
    refused = await guest.banger("vm", "workspace", "pull", "web", status=1)
    assert "git refuses" in refused.err
    after = sorted(os.walk(guest.source / ".git" / "hooks")), git(guest.source, "for-each-ref")
    assert after == before
    assert git(guest.source, "fsck", "--full", "--no-dangling") == b""
