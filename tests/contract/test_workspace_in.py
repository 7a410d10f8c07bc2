# SPDX-License-Identifier: MIT
"""Repositories into a guest: the CLI, the real daemon, the real agent, this machine's git."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from websockets.asyncio import client as websockets

from banger.contract import resources
from banger.workspace import repository
from banger.workspace import snapshot as snapshots
from tests.contract import cli_process, repositories, workspaces

Guest = workspaces.Guest
git = repositories.git


@pytest.mark.parametrize("state", repositories.STATES)
async def test_a_repository_arrives_exactly(guest: Guest, state: str) -> None:
    repositories.STATES[state](guest.source)
    before = repositories.status(guest.source, untracked=True)
    index = guest.source / ".git" / "index"
    index_before = index.read_bytes() if index.exists() else b""
    await guest.prepare()
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    names = repositories.tracked(guest.source)
    assert repositories.tracked(guest.repo) == names
    assert repositories.tree(guest.repo, names) == repositories.tree(guest.source, names)
    inside = {name for name in os.listdir(guest.repo) if name != ".git"}
    assert inside <= {os.fsdecode(name.split(b"/")[0]) for name in names}
    log = ("log", "--all", "--format=%H %D", "--decorate=full")
    assert git(guest.repo, *log) == git(guest.source, *log)
    assert git(guest.repo, "fsck", "--full", "--no-dangling") == b""
    assert repositories.status(guest.source, untracked=True) == before
    assert (index.read_bytes() if index.exists() else b"") == index_before
    assert git(guest.repo, "stash", "list") == b""


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_what_the_guest_has_in_its_commits_is_not_even_named(tmp_path: Path, commits: int) -> None:
    source = tmp_path / "source"
    repositories.plain(source)
    for number in range(50):
        (source / f"file-{number}").write_text(f"{number}\n")
    sent = repositories.commit(source)
    for number in range(commits):
        (source / "README").write_text(f"commit {number}\n")
        repositories.commit(source)
    (source / "file-7").write_text("changed\n")
    with snapshots.scratch(repository.find(source)) as scratch:
        ids = scratch.objects_since(scratch.take(), [sent])
        asked = "".join(f"{each}\n" for each in ids).encode()
        named = scratch.git("cat-file", "--batch-check", stdin=asked)
    kinds = [line.split()[1] for line in named.splitlines()]
    assert {kind: kinds.count(kind) for kind in (b"commit", b"tree", b"blob")} == {
        b"commit": commits,
        b"tree": commits + 1,
        b"blob": commits + 1,
    }


async def test_untracked_files_enter_only_when_asked_and_ignored_ones_never(guest: Guest) -> None:
    repositories.dirty(guest.source)
    await guest.prepare()
    assert not (guest.repo / "untracked.txt").exists()
    await guest.prepare("--include-untracked")
    assert (guest.repo / "untracked.txt").read_text() == "new\n"
    assert repositories.status(guest.repo, untracked=True) == repositories.status(
        guest.source, untracked=True
    )
    await guest.prepare()
    assert not (guest.repo / "untracked.txt").exists()
    assert not (guest.repo / ".env").exists()
    assert not (guest.repo / "secret.log").exists()


async def test_what_only_the_user_ignores_stays_here_too(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repositories.plain(guest.source)
    (guest.source / ".git" / "info" / "exclude").write_text("private\n")
    (tmp_path / "ignore").write_text("*.key\n")
    git(guest.source, "config", "core.excludesFile", str(tmp_path / "ignore"))
    for name in ("private", "a.key", "b.txt"):
        (guest.source / name).write_text(name)
    listed = await guest.prepare("--include-untracked", "--dry-run")
    assert listed.text.splitlines() == sorted(
        [".gitignore", "README", "b.txt", "link", "src/data.bin", "src/tool.sh"]
    )


async def test_a_dry_run_lists_exactly_what_arrives_and_makes_nothing(guest: Guest) -> None:
    repositories.staged(guest.source)
    listed = (await guest.prepare("--dry-run")).out.split(b"\n")[:-1]
    assert not guest.repo.exists()
    await guest.prepare()
    assert sorted(listed) == sorted(files_below(guest.repo))


def files_below(repo: Path) -> list[bytes]:
    found = [path.relative_to(repo) for path in repo.rglob("*") if path.is_symlink() or path.is_file()]
    return [os.fsencode(path) for path in found if path.parts[0] != ".git"]


async def test_a_second_prepare_sends_only_what_changed(guest: Guest) -> None:
    repositories.plain(guest.source)
    (guest.source / "large").write_bytes(os.urandom(3 << 20))
    git(guest.source, "add", "large")
    first = await guest.served_bytes()
    assert first > 3 << 20
    assert await guest.served_bytes() < 20_000
    (guest.source / "README").write_text("new\n")
    before = (guest.repo / "large").stat()
    assert await guest.served_bytes() < 20_000
    assert (guest.repo / "README").read_text() == "new\n"
    assert (guest.repo / "large").stat() == before
    repositories.commit(guest.source, "third")
    git(guest.source, "branch", "-D", "other")
    git(guest.source, "mv", "src/tool.sh", "tool.sh")
    assert await guest.served_bytes() < 20_000
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    log = ("log", "--all", "--format=%H %D", "--decorate=full")
    assert git(guest.repo, *log) == git(guest.source, *log)
    assert not (guest.repo / "src" / "tool.sh").exists()


async def test_a_change_within_the_index_s_own_instant_is_seen(guest: Guest) -> None:
    """Same size and time: only git's rule for racy entries finds it, and only with the index's own time."""
    repositories.plain(guest.source)
    for round_number in range(5):
        text = f"hello\nagain{round_number}\n"
        (guest.source / "README").write_text(text)
        git(guest.source, "add", "README")
        (guest.source / "README").write_text(text.upper())
        os.utime(guest.source / "README", ns=(os.stat(guest.source / ".git/index").st_mtime_ns,) * 2)
        await guest.prepare()
        assert (guest.repo / "README").read_text() == text.upper()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file": lambda repo: (repo / "README").write_text("mine\n"),
    "a deletion": lambda repo: (repo / "README").unlink(),
    "a commit": lambda repo: repositories.commit(repo),
    "another branch": lambda repo: git(repo, "checkout", "-q", "-b", "mine"),
    "a moved branch": lambda repo: git(repo, "branch", "-f", "other", "main"),
    "staged alone": lambda repo: git(
        repo,
        "update-index",
        "--cacheinfo",
        "100644",
        git(repo, "rev-parse", "HEAD:link").decode().strip(),
        "README",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_the_guests_work_is_never_replaced_unasked(guest: Guest, change: str) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "untracked").write_text("stays\n")
    CHANGES[change](guest.repo)
    (guest.source / "README").write_text("theirs\n")
    head, state = git(guest.repo, "rev-parse", "HEAD"), repositories.status(guest.repo)
    refused = await guest.prepare(status=1)
    assert "has changes of its own" in refused.err
    assert "workspace pull web" in refused.err
    assert (git(guest.repo, "rev-parse", "HEAD"), repositories.status(guest.repo)) == (head, state)
    await guest.prepare("--discard")
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    assert change == "a commit" or (guest.repo / "untracked").read_text() == "stays\n"


async def test_an_untracked_file_in_the_way_is_kept(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "new").write_text("mine\n")
    (guest.source / "new").write_text("theirs\n")
    git(guest.source, "add", "new")
    refused = await guest.prepare(status=1)
    assert "new" in refused.err
    assert (guest.repo / "new").read_text() == "mine\n"


async def test_a_directory_that_is_not_ours_is_left_alone(guest: Guest) -> None:
    repositories.plain(guest.source)
    guest.repo.mkdir(parents=True)
    (guest.repo / "mine").write_text("mine\n")
    assert "not a workspace of banger's" in (await guest.prepare("--discard", status=1)).err
    assert os.listdir(guest.repo) == ["mine"]
    assert os.listdir(guest.repo.parent) == ["repo"]


async def test_a_branch_for_the_guest(guest: Guest) -> None:
    repositories.dirty(guest.source)
    await guest.prepare("--branch", "fix/it")
    assert git(guest.repo, "symbolic-ref", "HEAD") == b"refs/heads/fix/it\n"
    assert git(guest.repo, "rev-parse", "HEAD") == git(guest.source, "rev-parse", "main")
    assert (guest.repo / "README").read_text() == "changed\n"
    assert b"fix/it" not in git(guest.source, "branch", "--list")
    await guest.prepare("--branch", "older", "--from", "v1~1", "--discard")
    assert git(guest.repo, "status", "--porcelain") == b""
    assert (guest.repo / "README").read_text() == "hello\n"
    assert "no commit 'nothing'" in (await guest.prepare("--from", "nothing", status=1)).err
    assert "cannot be the name" in (await guest.prepare("--branch", "a..b", status=2)).err


async def test_what_cannot_be_sent_is_refused_at_once(guest: Guest, tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "--bare", str(guest.source))
    assert "bare repository" in (await guest.prepare(status=2)).err
    words = ("vm", "workspace", "prepare", "web", str(tmp_path))
    assert "not in a git repository" in (await guest.banger(*words, status=2)).err
    assert "does not exist" in (await guest.banger(*words[:-1], str(tmp_path / "no"), status=2)).err
    assert not guest.repo.exists()


@pytest.mark.parametrize("kept_away", ["blob:none", "tree:0"])
async def test_a_partial_clone_is_refused_until_it_is_whole(
    guest: Guest, tmp_path: Path, kept_away: str
) -> None:
    repositories.plain(tmp_path / "all")
    git(tmp_path / "all", "config", "uploadpack.allowFilter", "true")
    git(tmp_path, "clone", "-q", f"--filter={kept_away}", f"file://{tmp_path / 'all'}", str(guest.source))
    refused = await guest.prepare("--dry-run", status=2)
    assert f"{guest.source} is a partial clone" in refused.err
    await guest.prepare("--mode", "full-copy")
    assert "git fetch --refetch --no-filter" in refused.err
    git(guest.source, "fetch", "-q", "--refetch", "--no-filter")
    guest.repo = tmp_path / "there" / "whole"
    await guest.prepare()
    assert git(guest.repo, "fsck", "--full", "--no-dangling") == b""
    assert git(guest.repo, "log", "--format=%H", "-p") == git(guest.source, "log", "--format=%H", "-p")


def changed_below(where: Path) -> None:
    (where / "libs" / "below" / "ignored.log").write_text("no\n")
    (where / "libs" / "below" / "README").write_text("changed\n")
    (where / ".git" / "hooks" / "post-checkout").write_text("#!/bin/sh\n")


async def test_submodules_need_a_full_copy(guest: Guest) -> None:
    repositories.with_submodule(guest.source)
    changed_below(guest.source)
    assert "--mode full-copy" in (await guest.prepare(status=2)).err
    assert not guest.repo.exists()
    await guest.prepare("--mode", "full-copy")
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    below = guest.repo / "libs" / "below"
    assert (below / "README").read_text() == "changed\n"
    assert not (below / "ignored.log").exists()
    assert not (guest.repo / ".git" / "hooks" / "post-checkout").exists()
    assert git(below, "log", "--format=%s") == b"second\nfirst\n"
    assert "there already" in (await guest.prepare("--mode", "full-copy", status=1)).err
    (guest.source / "README").write_text("again\n")
    await guest.prepare("--mode", "full-copy", "--discard")
    assert (guest.repo / "README").read_text() == "again\n"


async def test_odd_names_survive_a_full_copy(guest: Guest) -> None:
    repositories.odd_names(guest.source)
    await guest.prepare("--mode", "full-copy", "--include-untracked")
    names = repositories.tracked(guest.source)
    assert repositories.tree(guest.repo, names) == repositories.tree(guest.source, names)


# --- hostile repositories of the host ---


def booby_trapped(where: Path, mark: Path) -> None:
    """Everything in a repository's own files by which git could be made to run a program."""
    repositories.plain(where)
    program = where / ".git" / "trap"
    program.write_text(f"#!/bin/sh\necho $0 $* >> {mark}\ncat\n")
    program.chmod(0o755)
    for hook in (
        "post-checkout",
        "reference-transaction",
        "post-index-change",
        "pre-commit",
        "fsmonitor-watchman",
    ):
        (where / ".git" / "hooks").mkdir(exist_ok=True)
        (where / ".git" / "hooks" / hook).symlink_to(program)
    (where / ".gitattributes").write_text("* filter=trap diff=trap\n")
    repositories.commit(where)
    for key in (
        *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.alternateRefsCommand"),
        *("filter.trap.clean", "filter.trap.smudge", "filter.trap.process", "diff.external"),
        *("diff.trap.textconv", "diff.trap.command", "uploadpack.packObjectsHook", "gpg.program"),
        *("credential.helper", "core.askPass", "gc.recentObjectsHook"),
    ):
        git(where, "config", key, str(program))
    git(where, "config", "core.hooksPath", str(where / ".git" / "hooks"))
    git(where, "config", "remote.origin.url", f"ext::{program}")
    git(where, "config", "remote.origin.promisor", "true")
    git(where, "config", "extensions.partialClone", "origin")
    git(where, "config", "core.repositoryFormatVersion", "1")
    git(where, "config", "remote.near.url", str(where))
    git(where, "config", "remote.near.promisor", "true")
    git(where, "config", "remote.near.uploadpack", str(program))
    for protocol in ("protocol.allow", "protocol.ext.allow", "protocol.file.allow"):
        git(where, "config", protocol, "always")
    # Every path is called through a program instead, whatever it is that git is to fetch from.
    git(where, "config", f"url.ext::{program} .insteadOf", "/")
    (where / "README").write_text("changed\n")
    mark.unlink(missing_ok=True)


async def test_a_hostile_repository_runs_nothing_on_the_host(guest: Guest, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    booby_trapped(guest.source, mark)
    await guest.prepare("--include-untracked")
    assert (guest.repo / "README").read_text() == "changed\n"
    (guest.repo / "more").write_text("more\n")
    await guest.banger("vm", "workspace", "pull", "web")
    assert git(guest.source, "show", "banger/web:more") == b"more\n"
    assert "files in" not in (await guest.prepare("--dry-run")).err
    # An object that is missing is one that git would ask a remote for.
    (guest.source / ".git" / "refs" / "heads" / "gone").write_text(f"{'1' * 40}\n")
    await guest.prepare(status=1)
    await guest.banger("vm", "workspace", "pull", "web", "--branch", "second", status=1)
    assert not mark.exists(), mark.read_text()


# --- many, and interrupted ---


async def test_a_prepare_that_hangs_keeps_no_vm_alive(guest: Guest) -> None:
    link = await websockets.unix_connect(
        str(guest.served.path), "ws://banger/v1/vms/web/workspace/prepare", compression=None
    )
    await link.send('{"path": "' + str(guest.repo) + '"}')
    assert "exists" in str(await link.recv())
    waiting = asyncio.create_task(guest.prepare("--dry-run"))
    stopped = await guest.served.done("POST", "/v1/vms/web/stop")
    assert stopped.status is resources.OperationStatus.SUCCEEDED
    deleted = await guest.served.done("DELETE", "/v1/vms/web")
    assert deleted.status is resources.OperationStatus.SUCCEEDED
    await link.close()
    waiting.cancel()
    assert guest.served.daemon.world.leftovers() == {}


@pytest.mark.parametrize("after", [1, 2, 3, 4])
async def test_a_client_that_is_killed_leaves_nothing_half_done(guest: Guest, after: int) -> None:
    """Whatever it had sent until then, the workspace does not exist, and the next prepare makes it."""
    repositories.plain(guest.source)
    (guest.source / "large").write_bytes(os.urandom(1 << 20))
    git(guest.source, "add", "large")
    link = await websockets.unix_connect(
        str(guest.served.path), "ws://banger/v1/vms/web/workspace/prepare", compression=None
    )
    tree = git(guest.source, "write-tree").decode().strip()
    plan = f'{{"source": "x", "branch": "refs/heads/main", "worktree": "{tree}", "index": "{tree}"}}'
    messages: list[str | bytes] = [f'{{"path": "{guest.repo}"}}', plan, b"PACK", os.urandom(1000)]
    for message in messages[:after]:
        await link.send(message)
    link.transport.abort()
    await guest.prepare()
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    assert os.listdir(guest.repo.parent) == ["repo"]


async def test_what_the_guest_lacks_is_said_in_pieces(guest: Guest) -> None:
    """Of 10,000 objects, to a client that takes no long messages: there is no length at which it ends."""
    repositories.plain(guest.source)
    await guest.prepare()
    tree = git(guest.source, "write-tree").decode().strip()
    plan = f'{{"source": "x", "branch": "refs/heads/main", "worktree": "{tree}", "index": "{tree}"}}'
    ids = [tree, *(f"{number:040x}" for number in range(1, 10_000))]
    async with websockets.unix_connect(
        str(guest.served.path),
        "ws://banger/v1/vms/web/workspace/prepare",
        compression=None,
        max_size=64 << 10,
    ) as link:
        await link.send(f'{{"path": "{guest.repo}"}}')
        assert "exists" in str(await link.recv())
        for message in (plan, "".join(f"{each}\n" for each in ids).encode(), b""):
            await link.send(message)
        said = b""
        while piece := await link.recv():
            assert isinstance(piece, bytes)
            said += piece
    assert said.decode().splitlines() == [tree, *(f"{each} missing" for each in ids[1:])]


async def test_a_vm_that_does_not_run_is_named(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.served.done("POST", "/v1/vms/web/stop")
    for words in (
        ("prepare", "web", str(guest.source)),
        ("export", "web"),
        ("pull", "web", str(guest.source)),
    ):
        assert "web is not running" in (await guest.banger("vm", "workspace", *words, status=1)).err


@pytest.mark.timeout(600)
async def test_fifty_thousand_files(guest: Guest) -> None:
    repositories.plain(guest.source)
    for number in range(100):
        (guest.source / f"d{number}").mkdir()
    for number in range(50_000):
        (guest.source / f"d{number % 100}" / f"f{number}").write_text(f"content of {number}\n")
    repositories.commit(guest.source)
    (guest.source / "d1" / "f1").write_text("changed\n")
    await guest.prepare()
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    (guest.source / "d2" / "f2").write_text("changed\n")
    assert await guest.served_bytes() < 50_000
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    (guest.repo / "d3" / "f3").write_text("work\n")
    await guest.banger("vm", "workspace", "pull", "web")
    assert git(guest.source, "diff", "--name-only", "banger/web") == b"d3/f3\n"


_GIB = 1 << 30


@pytest.mark.timeout(600)
async def test_a_file_of_one_gibibyte_takes_no_memory(guest: Guest) -> None:
    """Nobody may hold it: the client and its git get less address space than it has bytes."""
    repositories.plain(guest.source)
    large = guest.source / "large"
    with large.open("wb") as file:
        file.truncate(_GIB)
        for place in range(0, _GIB, _GIB // 16):
            file.seek(place)
            file.write(os.urandom(4096))
    git(guest.source, "add", "large")
    before = _resident_bytes()
    words = ("vm", "workspace", "prepare", "web", str(guest.source), "--guest-path", str(guest.repo))
    done = await asyncio.to_thread(
        cli_process.Cli(guest.served.path).run, *words, memory_bytes=_GIB * 3 // 4, timeout_s=500
    )
    assert done.status == 0, done.err
    assert _resident_bytes() - before < _GIB // 8, "the daemon"
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    same = await asyncio.create_subprocess_exec("cmp", large, guest.repo / "large")
    assert await same.wait() == 0


def _resident_bytes() -> int:
    """The most that this process, which is the daemon's too, ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
