# SPDX-License-Identifier: MIT
"""Paths of this host that cannot be used: each is named, with why, and is no fault of banger's."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract import cli_process, test_cli_commands, workspaces
from tests.fakes import daemon

Guest = workspaces.Guest


@pytest.fixture
def fake() -> Iterator[daemon.FakeDaemon]:
    """A daemon with a running VM, `web`, whose socket anybody may use."""
    with cli_process.fake_daemon() as made:
        made.add_vm("web")
        made.path.parent.chmod(0o755)
        made.path.chmod(0o666)
        yield made


@pytest.fixture
def closed(fake: daemon.FakeDaemon) -> Path:
    """A directory with a repository in it that only root may enter; its way is open to all."""
    inside = fake.path.parent / "closed"
    subprocess.run(["git", "init", "-q", inside / "repository"], check=True)
    inside.chmod(0o700)
    return inside


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("vm", "run", "{}/repository"), 2, "{}/repository cannot be looked at: Permission denied"),
        (("vm", "run", "{}", "--dry-run"), 125, "cannot work in {}: Permission denied"),
        (("vm", "cp", "{}/x", "web:"), 2, "{}/x cannot be looked at: Permission denied"),
        (("vm", "cp", "web:/etc/hostname", "{}/x"), 1, "{}/x: Permission denied"),
    ],
)
def test_what_a_user_may_not_reach_is_named(
    cli: cli_process.Cli, closed: Path, words: tuple[str, ...], status: int, said: str
) -> None:
    done = test_cli_commands.as_nobody(cli, *(word.format(closed) for word in words))
    assert said.format(closed) in done.stderr.decode()
    assert b"fault in banger" not in done.stderr
    assert done.returncode == status


@pytest.mark.parametrize("words", ["run --guest-path repo .", "exec --guest-path repo web ls"])
def test_a_path_in_the_guest_is_checked_before_anything_is_made(cli: cli_process.Cli, words: str) -> None:
    done = cli.run("vm", *words.split())
    assert (done.status, done.out) == (2, b"")
    assert "'repo' is no path in a guest: it begins with /" in done.err


def test_a_directory_that_is_gone_is_told_as_that(cli: cli_process.Cli, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    argv = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *cli.argv("vm", "run", ".", "--", "ls")]
    done = subprocess.run(
        argv, cwd=tmp_path / "gone", env=cli.environment(), capture_output=True, text=True, check=False
    )
    assert "the directory that you are in is gone" in done.stderr
    assert done.returncode != 0


async def test_a_patch_that_cannot_be_written_names_where(guest: Guest, tmp_path: Path) -> None:
    repository = guest.source
    repository.mkdir(parents=True)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), (*identity, "commit", "-qm", "one", "--allow-empty")):
        await asyncio.to_thread(subprocess.run, ["git", *words], cwd=repository, check=True)
    await guest.prepare()
    (guest.repo / "new").write_text("work\n")
    export = ("vm", "workspace", "export", "web", "-o")
    for target, status, said in (
        ("/nonexistent/x", 1, "cannot write /nonexistent/x: No such file or directory"),
        (str(tmp_path), 2, f"{tmp_path} is a directory"),
    ):
        assert said in (await guest.banger(*export, target, status=status)).err
    assert b"+work" in (await guest.banger(*export, "-")).out
