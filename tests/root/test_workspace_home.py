# SPDX-License-Identifier: MIT
"""What a VM's `/root` is to who works there, over the real daemon and an agent that has its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from banger.contract import errors
from banger.owner import composition
from banger.workspace import repository
from tests.contract import api_served, conftest, repositories, workspaces
from tests.fakes import world as worlds
from tests.root import rooted_agent

Guest = workspaces.Guest
REPO = Path("/root/repo")


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    """A served daemon with one running VM, `web`, that has a `/root`, mounts and a name of its own."""
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as name:
        top = Path(name)
        paths, home = conftest.laid_out(top), top / "root"
        conftest.furnish(paths)
        home.mkdir()
        world = worlds.World(
            state=paths.state, jails=paths.helper_dir / "jails", logs=paths.helper_dir / "logs"
        )
        with rooted_agent.running(top, {"/root": home}) as agent:
            world.behaviour.agent = agent
            async with composition.compose(
                conftest.SETTINGS, conftest.NETWORK, paths, world, "0" * 64
            ) as services:
                daemon = conftest.Daemon(services, paths, world)
                await daemon.create()
                async with api_served.serving(daemon) as served:
                    yield Guest(served, tmp_path / "here", REPO)
        await world.close()


async def restarted(guest: Guest, *mounts: Path) -> str:
    """What is said of the start. The machine behind the VM stays: what its kernel forgets is taken away."""
    for each in mounts:
        await guest.banger("vm", "exec", "web", "--cwd", "/", "--", "umount", str(each))
    await guest.banger("vm", "stop", "web")
    return (await guest.banger("vm", "start", "web")).err


async def test_read_only_workspaces_are_read_only_after_a_restart(guest: Guest) -> None:
    """Also one that was not sent last; and the others are not."""
    repositories.plain(guest.source)
    other = Path("/root/other")
    touch = ("vm", "exec", "web", "--", "touch")
    await guest.prepare("--readonly")
    await guest.banger("vm", "workspace", "prepare", "web", str(guest.source), "--guest-path", str(other))
    await restarted(guest, REPO)
    await guest.banger(*touch, f"{other}/x")
    assert "Read-only" in (await guest.banger(*touch, f"{REPO}/x", status=1)).err
    await guest.prepare()
    await guest.banger(*touch, f"{REPO}/x")


async def test_what_can_be_read_only_no_more_is_said_and_keeps_no_vm_from_starting(guest: Guest) -> None:
    repositories.plain(guest.source)
    await guest.prepare("--readonly")
    words = ("vm", "exec", "web", "--cwd", "/", "--", "sh", "-c")
    await guest.banger(*words, "umount /root/repo && mv /root/repo /root/elsewhere")
    assert "/root/repo in web is not read-only any more" in await restarted(guest)
    await guest.banger("vm", "exec", "web", "--cwd", "/", "--", "true")


def test_a_directory_is_in_no_repository_of_another_user_above_it(tmp_path: Path) -> None:
    """Such as /tmp/.git: who made it says which files of those below are sent, and what is beside them."""
    above, mine = tmp_path / "above", tmp_path / "above" / "mine"
    repositories.plain(above)
    mine.mkdir()
    os.chown(above / ".git", 65534, 65534)
    with pytest.raises(errors.BadRequestError, match="belongs to another user"):
        repository.find(mine)
    assert repository.find(above).top == above  # named itself
    os.chown(mine, 65534, 65534)
    assert repository.find(mine).top == above  # all of it is theirs
