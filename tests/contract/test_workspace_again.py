# SPDX-License-Identifier: MIT
"""To and fro: what was pulled is no longer the guest's alone, and is replaced by what is sent next.

And what was made of the guest's repository meanwhile is no reason for a prepare to fail half way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import repositories, workspaces

Guest = workspaces.Guest
git = repositories.git


def work(guest: Guest) -> None:
    """Commits, and what is not committed: changed, staged and new."""
    (guest.repo / "README").write_text("committed in the guest\n")
    repositories.commit(guest.repo, "in the guest")
    (guest.repo / "README").write_text("and changed again\n")
    (guest.repo / "staged").write_text("staged\n")
    git(guest.repo, "add", "staged")
    (guest.repo / "new").write_text("not known to git\n")


async def pull(guest: Guest) -> None:
    await guest.banger("vm", "workspace", "pull", "web")


async def pulled(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    work(guest)
    await pull(guest)


def tip(guest: Guest) -> str:
    return git(guest.source, "rev-parse", "banger/web").decode().strip()


async def test_what_was_pulled_and_merged_is_sent_again(guest: Guest) -> None:
    await pulled(guest)
    git(guest.source, "merge", "-q", "banger/web")
    (guest.source / "here").write_text("made on the host\n")
    repositories.commit(guest.source, "on the host")
    await guest.prepare()
    assert (guest.repo / "new").read_text() == "not known to git\n"
    assert (guest.repo / "here").exists()
    assert git(guest.repo, "status", "--porcelain") == b""
    assert git(guest.repo, "rev-parse", "HEAD") == git(guest.source, "rev-parse", "HEAD")


async def test_what_was_pulled_and_not_merged_is_on_its_branch(guest: Guest) -> None:
    await pulled(guest)
    await guest.prepare()
    assert not (guest.repo / "new").exists()
    assert git(guest.repo, "status", "--porcelain") == git(guest.source, "status", "--porcelain")
    assert git(guest.source, "show", "banger/web:new") == b"not known to git\n"


async def test_one_change_more_is_the_guest_s_again(guest: Guest) -> None:
    await pulled(guest)
    git(guest.source, "merge", "-q", "banger/web")
    (guest.repo / "new").write_text("after the pull\n")
    assert "changes of its own" in (await guest.prepare(status=1)).err
    assert (guest.repo / "new").read_text() == "after the pull\n"


async def test_what_no_branch_holds_any_more_is_not_given_up(guest: Guest) -> None:
    await pulled(guest)
    git(guest.source, "branch", "-D", "banger/web")
    assert "changes of its own" in (await guest.prepare(status=1)).err
    assert (guest.repo / "new").exists()


async def test_the_same_work_pulled_twice_is_the_same_commit(guest: Guest) -> None:
    await pulled(guest)
    before = tip(guest)
    await pull(guest)
    assert tip(guest) == before


async def test_keys_that_have_more_values_in_the_guest_stay_as_they_are(guest: Guest) -> None:
    repositories.plain(guest.source)
    git(guest.source, "remote", "add", "origin", "https://example.org/here")
    await guest.prepare()
    git(guest.repo, "config", "--add", "remote.origin.fetch", "+refs/pull/*:refs/remotes/pull/*")
    (guest.source / "README").write_text("newer\n")
    git(guest.source, "remote", "set-url", "origin", "https://example.org/there")
    await guest.prepare()
    assert (guest.repo / "README").read_text() == "newer\n"
    assert git(guest.repo, "config", "remote.origin.url") == b"https://example.org/there\n"
    assert len(git(guest.repo, "config", "--get-all", "remote.origin.fetch").splitlines()) == 2


async def test_a_branch_that_stood_for_another_becomes_its_own(guest: Guest) -> None:
    repositories.plain(guest.source)
    git(guest.source, "symbolic-ref", "refs/heads/alias", "refs/heads/main")
    await guest.prepare()
    git(guest.source, "symbolic-ref", "--delete", "refs/heads/alias")
    git(guest.source, "branch", "alias", "main~1")
    await guest.prepare()
    assert git(guest.repo, "show-ref", "--heads") == git(guest.source, "show-ref", "--heads")
    git(guest.source, "branch", "-D", "alias")
    await guest.prepare()
    assert git(guest.repo, "show-ref", "--heads") == git(guest.source, "show-ref", "--heads")


def conflict(where: Path, *command: str) -> None:
    """`command` stops at a conflict."""
    git(where, "switch", "-q", "-c", "theirs", "main~1")
    (where / "README").write_text("of theirs\n")
    repositories.commit(where, "theirs")
    git(where, "switch", "-q", "main")
    git(where, *command, "theirs", check=False)
    assert b"UU README" in git(where, "status", "--porcelain")


@pytest.mark.parametrize("command", ["merge", "rebase", "cherry-pick"])
async def test_what_was_under_way_in_the_guest_is_discarded_too(guest: Guest, command: str) -> None:
    """A commit made there next would be one of two parents, of what nobody sees any more."""
    repositories.plain(guest.source)
    await guest.prepare()
    conflict(guest.repo, command)
    await guest.prepare("--discard")
    assert git(guest.repo, "status") == git(guest.source, "status")
    (guest.repo / "README").write_text("after\n")
    repositories.commit(guest.repo, "after")
    assert len(git(guest.repo, "log", "-1", "--format=%P").split()) == 1
