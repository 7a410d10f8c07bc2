# SPDX-License-Identifier: MIT
"""`vm run PATH` and `vm exec` in a workspace, over the real daemon and agent: refused early, or exact."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
from pathlib import Path

import pytest

from banger.contract import resources
from banger.images import edit
from banger.images.mkfs import filesystem
from tests.contract import cli_process, conftest, repositories, workspaces

Guest = workspaces.Guest
git = repositories.git


async def names(guest: Guest) -> list[str]:
    return [vm.name for vm in await guest.served.get("/v1/vms", list[resources.Vm])]


def run_words(guest: Guest, *options: str) -> tuple[str, ...]:
    return ("vm", "run", *options, str(guest.source), "--guest-path", str(guest.repo))


async def test_a_command_runs_in_the_repository_and_gives_its_status(guest: Guest) -> None:
    repositories.dirty(guest.source)
    script = "pwd; cat README; git status --porcelain; exit 7"
    done = await guest.banger(*run_words(guest, "--rm"), "--", "sh", "-c", script, status=7)
    assert done.text.splitlines()[:2] == [str(guest.repo), "changed"]
    assert "M README" in done.text
    assert await names(guest) == ["web"]


async def test_without_a_command_it_is_a_shell_in_the_repository(guest: Guest) -> None:
    repositories.plain(guest.source)
    done = await guest.banger(
        *run_words(guest, "--name", "shop"), stdin=b"pwd; cat README; exit 4\n", status=4
    )
    assert done.text == f"{guest.repo}\nhello\nagain\n"
    assert sorted(await names(guest)) == ["shop", "web"]


async def test_it_stays_without_rm_and_detached(guest: Guest) -> None:
    repositories.plain(guest.source)
    done = await guest.banger(*run_words(guest, "-d", "--name", "shop", "--branch", "fix"))
    assert done.text == "shop\n"
    assert git(guest.repo, "symbolic-ref", "HEAD") == b"refs/heads/fix\n"
    inside = await guest.banger("vm", "exec", "shop", "--", "pwd")
    assert (inside.text, inside.err) == (f"{guest.repo}\n", "")


async def test_a_dry_run_makes_nothing(guest: Guest) -> None:
    repositories.dirty(guest.source)
    listed = await guest.banger(*run_words(guest, "--dry-run", "--rm"))
    assert listed.text.splitlines() == [".gitignore", "README", "link", "src/data.bin", "src/tool.sh"]
    assert listed.err == ""
    assert await names(guest) == ["web"]
    assert not guest.repo.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--include-untracked",), "for a repository"),
        (("--branch", "x"), "for a repository"),
        (("--dry-run",), "of a repository"),
        (("a", "b"), "one repository, not 2"),
        (("/nonexistent",), "does not exist"),
        (("-d", "--rm", "."), "exclude each other"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_is_made(
    guest: Guest, options: tuple[str, ...], message: str
) -> None:
    assert message in (await guest.banger("vm", "run", *options, status=2)).err
    assert await names(guest) == ["web"]


async def test_repositories_that_cannot_go_in_are_refused_before_anything_is_made(guest: Guest) -> None:
    repositories.plain(guest.source)
    git(guest.source, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},module")
    assert "submodule" in (await guest.banger(*run_words(guest, "--rm"), status=125)).err
    git(guest.source, "reset", "-q")
    (guest.source / ".mise.toml").write_text("[tools]\n")
    git(guest.source, "add", ".mise.toml")
    refused = await guest.banger(*run_words(guest, "--rm"), status=125)
    assert "--no-bootstrap" in refused.err
    await guest.banger(*run_words(guest, "--rm", "--no-bootstrap"), "--", "true")
    assert await names(guest) == ["web"]
    git(guest.source.parent, "init", "-q", "--bare", "bare")
    bare = ("vm", "run", "--rm", str(guest.source.parent / "bare"))
    assert "bare repository" in (await guest.banger(*bare, status=125)).err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
@pytest.mark.parametrize("remove", [True, False])
async def test_an_end_while_the_repository_goes_in(
    guest: Guest, number: signal.Signals, *, remove: bool
) -> None:
    """With --rm nothing is left; without, the VM is kept and named. Never half a workspace."""
    repositories.plain(guest.source)
    reached, never = asyncio.Event(), asyncio.Event()

    async def stand_still() -> None:
        reached.set()
        await never.wait()

    guest.served.daemon.world.behaviour.on_put = stand_still
    words = run_words(guest, "--name", "shop", *(["--rm"] if remove else []))
    with cli_process.Cli(guest.served.path).started(*words, "--", "true") as process:
        await asyncio.wait_for(reached.wait(), cli_process.DEADLINE_S)
        process.send_signal(number)
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGKILL: -9}
    assert status == expected[number], said
    assert not guest.repo.exists()
    if remove:
        await until_deleted(guest)
        assert await names(guest) == ["web"]
    else:
        assert await names(guest) == ["shop", "web"] or sorted(await names(guest)) == ["shop", "web"]
        assert number is signal.SIGKILL or "shop goes on" in said


def stuck(source: Path) -> Path:
    """A pipe: reading this repository goes on when somebody has opened it for writing, and closed it."""
    pipe = source.with_name(f"pipe-{len(os.listdir(source.parent))}")
    os.mkfifo(pipe)
    git(source, "config", "core.attributesFile", str(pipe))
    return pipe


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_an_end_while_the_repository_is_read_leaves_nothing(
    guest: Guest, tmp_path: Path, number: signal.Signals
) -> None:
    repositories.plain(guest.source)
    scratch, pipe = tmp_path / "scratch", stuck(guest.source)
    scratch.mkdir()
    words = run_words(guest, "--name", "shop")
    with cli_process.Cli(guest.served.path).started(*words, env={"TMPDIR": str(scratch)}) as process:
        held = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
        assert len(os.listdir(scratch)) == 1
        process.send_signal(number)
        assert await asyncio.to_thread(process.wait, cli_process.DEADLINE_S) == 128 + number
        os.close(held)
    assert os.listdir(scratch) == []
    assert await names(guest) == ["web"]


async def test_what_a_killed_client_left_is_swept_by_the_next_and_nothing_else(
    guest: Guest, tmp_path: Path
) -> None:
    repositories.plain(guest.source)
    scratch, pipe = tmp_path / "scratch", stuck(guest.source)
    scratch.mkdir()
    cli, env = cli_process.Cli(guest.served.path), {"TMPDIR": str(scratch)}
    words = ("vm", "run", "--dry-run", str(guest.source))
    with cli.started(*words, env=env) as killed:
        # The git that it ran outlives it; while this is open that writes nothing into what is swept.
        orphan = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    (left,) = os.listdir(scratch)
    (scratch / "banger-git-of-a-link").symlink_to(guest.source)
    pipe = stuck(guest.source)
    with cli.started(*words, env=env) as living:
        held = await asyncio.to_thread(os.open, pipe, os.O_WRONLY)
        before = sorted(os.listdir(scratch))
        assert len(before) == 2
        assert left not in before
        git(guest.source, "config", "--unset", "core.attributesFile")
        assert (await asyncio.to_thread(cli.run, *words, env=env)).status == 0
        assert sorted(os.listdir(scratch)) == before
        os.close(held)
        assert await asyncio.to_thread(living.wait, cli_process.DEADLINE_S) == 0
    assert os.listdir(scratch) == ["banger-git-of-a-link"]
    os.close(orphan)
    assert (guest.source / "README").exists()


BOOTSTRAPS = [
    (signal.SIGINT, ()),
    (signal.SIGTERM, ("--rm",)),
    (signal.SIGHUP, ("-d",)),
    (signal.SIGTERM, ()),
    (signal.SIGKILL, ()),
]


@pytest.mark.parametrize(("number", "options"), BOOTSTRAPS)
async def test_an_end_while_tools_are_installed(
    guest: Guest, tmp_path: Path, number: signal.Signals, options: tuple[str, ...]
) -> None:
    """The installation ends in the guest too."""
    repositories.plain(guest.source)
    (guest.source / "mise.toml").write_text("[tools]\n")
    repositories.commit(guest.source)
    os.mkfifo(tmp_path / "pid")
    script = (
        f'[ "$1" = install ] || exit 0\ntrap "" INT TERM\necho $$ > {tmp_path}/pid\nsleep 1000\nsleep 1000'
    )
    _image_with_mise(guest, tmp_path / "image", script)
    words = run_words(guest, "--name", "shop", "--nat", *options)
    tail = () if "-d" in options else ("--", "true")
    with cli_process.Cli(guest.served.path).started(*words, *tail) as process:
        installer = os.pidfd_open(int(await asyncio.to_thread((tmp_path / "pid").read_text)))
        process.send_signal(number)
        status = await asyncio.to_thread(process.wait, cli_process.DEADLINE_S)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert status == (-9 if number is signal.SIGKILL else 128 + number), said
    assert await asyncio.to_thread(has_ended, installer), "it goes on"
    if "--rm" in options:
        await until_deleted(guest)
    assert ("shop" in await names(guest)) is ("--rm" not in options)
    if number is not signal.SIGKILL:
        assert "tools are not all installed" in said
        assert ("nothing is left of shop" if "--rm" in options else "shop goes on") in said


def has_ended(process: int) -> bool:
    """By its pidfd, which is closed."""
    try:
        return bool(select.select([process], [], [], cli_process.DEADLINE_S)[0])
    finally:
        os.close(process)


async def until_deleted(guest: Guest) -> None:
    operations = guest.served.daemon.services.operations
    async with asyncio.timeout(cli_process.DEADLINE_S):
        # Nothing announces the start of an operation.
        while not any(each.kind == "vm.delete" for each in operations.list()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for each in operations.list():
            await operations.wait(each.id)


# --- exec in a workspace ---


async def test_exec_begins_in_the_workspace_and_says_that_the_host_moved_on(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    same = await guest.banger("vm", "exec", "web", "--", "pwd")
    assert (same.text, same.err) == (f"{guest.repo}\n", "")
    assert (await guest.banger("vm", "exec", "--cwd", "/", "web", "--", "pwd")).text == "/\n"
    (guest.source / "README").write_text("newer\n")
    old = await guest.banger("vm", "exec", "web", "--", "cat", "README")
    assert old.text == "hello\nagain\n"
    assert "have changed since it was sent; --auto-prepare" in old.err
    new = await guest.banger("vm", "exec", "--auto-prepare", "web", "--", "cat", "README")
    assert new.text == "newer\n"
    repositories.commit(guest.source)
    assert "has other commits" in (await guest.banger("vm", "exec", "web", "--", "true")).err


async def test_each_workspace_of_a_vm_is_known(guest: Guest, tmp_path: Path) -> None:
    """Not only the one that was sent last."""
    repositories.plain(guest.source)
    await guest.prepare()
    other, there = tmp_path / "other", tmp_path / "there" / "other"
    repositories.plain(other)
    await guest.banger("vm", "workspace", "prepare", "web", str(other), "--guest-path", str(there))
    assert (await guest.banger("vm", "exec", "web", "--", "pwd")).text == f"{there}\n"
    first = ("vm", "exec", "--guest-path", f"{guest.repo}/")
    same = await guest.banger(*first, "web", "--", "pwd")
    assert (same.text, same.err) == (f"{guest.repo}\n", "")
    (guest.source / "README").write_text("newer\n")
    assert (await guest.banger("vm", "exec", "web", "--", "true")).err == ""
    old = await guest.banger(*first, "web", "--", "cat", "README")
    assert f"files in {guest.source} have changed since it was sent" in old.err
    new = await guest.banger(*first, "--auto-prepare", "web", "--", "cat", "README")
    assert new.text == "newer\n"
    (there / "README").write_text("done in the guest\n")
    await guest.banger("vm", "workspace", "pull", "web", "--guest-path", str(there))
    assert git(other, "show", "banger/web:README") == b"done in the guest\n"
    shown = (await guest.banger("vm", "show", "web")).text
    assert f"{there}, from {other}" in shown
    assert f"{guest.repo}, from {guest.source}" in shown
    words = ("vm", "exec", "--guest-path", "/nowhere/else", "--auto-prepare", "web", "--", "true")
    refused = (await guest.banger(*words, status=125)).err
    assert "no workspace at /nowhere/else" in refused
    assert "--guest-path /nowhere/else" in refused


async def test_exec_in_a_full_copy_never_runs_old_files_silently(guest: Guest) -> None:
    repositories.plain(guest.source)
    below = guest.source.with_name("below")
    repositories.plain(below)
    git(guest.source, "submodule", "add", "-q", str(below), "libs/below")
    repositories.commit(guest.source)
    await guest.prepare("--mode", "full-copy")
    words = ("vm", "exec", "web", "--", "cat", "libs/below/README")
    auto = ("vm", "exec", "--auto-prepare", "web", "--", "cat", "libs/below/README")
    git(guest.source, "status")
    for each in (words, auto):
        assert (await guest.banger(*each)).err == ""
    (guest.source / "libs/below/README").write_text("newer\n")
    assert f"files in {guest.source} have changed since it was sent" in (await guest.banger(*words)).err
    refused = (await guest.banger(*auto, status=125)).err
    assert "--mode full-copy --discard" in refused
    await guest.prepare("--mode", "full-copy", "--discard")
    done = await guest.banger(*auto)
    assert (done.text, done.err) == ("newer\n", "")


async def test_auto_prepare_says_that_a_commit_does_not_change(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare("--from", "main")
    (guest.source / "README").write_text("newer\n")
    assert (await guest.banger("vm", "exec", "web", "--", "true")).err == ""
    done = await guest.banger("vm", "exec", "--auto-prepare", "web", "--", "cat", "README")
    assert done.text == "hello\nagain\n"
    assert "--from" in done.err
    assert "nothing is sent" in done.err


async def test_auto_prepare_never_replaces_the_guests_work(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    (guest.repo / "README").write_text("mine\n")
    (guest.source / "README").write_text("theirs\n")
    words = ("vm", "exec", "--auto-prepare", "web", "--", "true")
    assert "changes of its own" in (await guest.banger(*words, status=125)).err
    assert (guest.repo / "README").read_text() == "mine\n"


async def test_auto_prepare_needs_a_workspace(guest: Guest) -> None:
    words = ("vm", "exec", "--auto-prepare", "web", "--", "true")
    assert "has no workspace" in (await guest.banger(*words, status=125)).err


async def test_a_repository_that_is_gone_does_not_keep_a_command_from_running(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare()
    guest.source.rename(guest.source.with_name("elsewhere"))
    done = await guest.banger("vm", "exec", "web", "--", "pwd")
    assert done.text == f"{guest.repo}\n"
    assert "cannot compare" in done.err


async def test_a_command_that_takes_too_long_is_ended(guest: Guest) -> None:
    done = await guest.banger("vm", "exec", "--timeout", "0.5s", "web", "--", "sleep", "60", status=124)
    assert (done.out, done.err) == (b"", "banger: sleep took longer than 0.5 seconds, and was ended\n")
    status_of_its_own = ("vm", "exec", "--timeout", "1m", "web", "--", "sh", "-c", "exit 124")
    assert (await guest.banger(*status_of_its_own, status=124)).err == ""
    stubborn = "trap '' TERM; echo ready; while :; do sleep 1; done"
    words = ("vm", "exec", "--timeout", "1", "web", "--", "sh", "-c", stubborn)
    # On a busy machine its time may be over before it has said a word.
    done = await guest.banger(*words, status=124)
    assert done.text in ("ready\n", "")
    assert done.err == "banger: sh took longer than 1 second, and was ended\n"
    await guest.banger("vm", "exec", "--timeout", "1m", "web", "--", "true")
    await guest.banger("vm", "exec", "--timeout", "soon", "web", "--", "true", status=2)


async def test_an_image_that_lacks_a_program_is_refused_before_anything_is_made(guest: Guest) -> None:
    """Of git and mise the image's files tell; what is in `/root` nobody sees before the VM runs."""
    repositories.plain(guest.source)
    (guest.source / "mise.toml").write_text("[tools]\n")
    repositories.commit(guest.source)
    image = guest.served.daemon.paths.state / "images" / conftest.IMAGE_ID
    words = (*run_words(guest, "--rm", "--nat", "--name", "shop"), "--", "true")
    for held, lacking, hint in (
        (["usr/bin/sh"], "git", "full-copy"),
        (["bin/sh"], "git", "full-copy"),  # as in BusyBox's image, which has no /usr/bin
        (["usr/bin/git"], "mise", "--no-bootstrap"),
        (["usr/bin/git", "opt/bin/mise"], "mise", "docs/workspace.md"),
    ):
        _say_of_image(guest, size_bytes=_files(image / "rootfs.ext4", *held))
        refused = (await guest.banger(*words, status=125)).err
        assert f"image tiny has no {lacking}" in refused, refused
        assert hint in refused
    kinds = [each.kind for each in guest.served.daemon.services.operations.list()]
    assert kinds == ["vm.create"], "that of `web`"
    for path in ("/opt/bin", "/root/.local/bin"):
        _say_of_image(guest, run={"env": [f"PATH={path}"]})
        assert "which shop does not have" in (await guest.banger(*words, status=125)).err


def _files(rootfs: Path, *names: str) -> int:
    """A file system with these files, and how large it is."""
    rootfs.unlink()
    with filesystem.Filesystem(rootfs) as made:
        edits = edit.Edits(made)
        for name in names:
            edits.write(f"/{name}", [b"program"], permissions=0o755)
        return made.finish(headroom_bytes=1 << 20, label="root")


async def test_tools_that_cannot_be_installed_are_loud(guest: Guest) -> None:
    repositories.plain(guest.source)
    (guest.source / ".tool-versions").write_text("zig 0.13\n")
    repositories.commit(guest.source)
    refused = await guest.banger(*run_words(guest, "--rm"), "--", "true", status=125)
    assert "--nat" in refused.err
    failed = await guest.banger(*run_words(guest, "--rm", "--nat"), "--", "true", status=125)
    assert "which" in failed.err
    assert "does not have" in failed.err
    assert await names(guest) == ["web"]


def _image_with_mise(guest: Guest, directory: Path, script: str) -> Path:
    """The guest's home. The image has a `mise` that does what the script says."""
    program, home = directory / "bin" / "mise", directory / "home"
    program.parent.mkdir(parents=True)
    home.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    env = [f"PATH={program.parent}:{os.environ['PATH']}", f"HOME={home}"]
    _say_of_image(guest, run={"env": env})
    return home


def _say_of_image(guest: Guest, **fields: object) -> None:
    about = guest.served.daemon.paths.state / "images" / conftest.IMAGE_ID / "image.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | fields))


async def test_declared_tools_are_installed_before_the_command_runs(guest: Guest, tmp_path: Path) -> None:
    repositories.plain(guest.source)
    (guest.source / "mise.toml").write_text('[tools]\nzig = "0.13"\n')
    repositories.commit(guest.source)
    script = 'echo "$PWD: $*"\nif [ "$1" = install ]; then cp mise.toml "$HOME/installed"; fi'
    home = _image_with_mise(guest, tmp_path / "image", script)
    done = await guest.banger(*run_words(guest, "--rm", "--nat"), "--", "cat", str(home / "installed"))
    assert done.text == '[tools]\nzig = "0.13"\n'
    assert "installing the repository's tools" in done.err
    log = (home / ".banger-bootstrap.log").read_text().splitlines()
    assert log == [f"{guest.repo}: trust -q {guest.repo}", f"{guest.repo}: install --yes"]
    (home / "installed").unlink()
    await guest.banger(*run_words(guest, "--rm", "--no-bootstrap"), "--", "true")
    assert not (home / "installed").exists()


async def test_tools_whose_installation_fails_are_loud(guest: Guest, tmp_path: Path) -> None:
    repositories.plain(guest.source)
    (guest.source / "mise.toml").write_text("[tools]\n")
    repositories.commit(guest.source)
    script = '[ "$1" = install ] || exit 0\nprintf "\\033]0;owned\\007"; echo "no such tool: zog"; exit 3'
    home = _image_with_mise(guest, tmp_path / "image", script)
    failed = await guest.banger(*run_words(guest, "--rm", "--nat"), "--", "true", status=125)
    assert "\\x1b]0;owned\\x07no such tool: zog" in failed.err, "the end of the log, and no terminal for it"
    assert "could not be installed" in failed.err
    assert ".banger-bootstrap.log" in failed.err
    assert "no such tool: zog" in (home / ".banger-bootstrap.log").read_text()
    assert await names(guest) == ["web"]
