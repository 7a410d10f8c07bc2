# SPDX-License-Identifier: MIT
"""Prepares of one VM take turns: nothing is mixed, and nobody waits without a word or without end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio import client as websockets

from banger.owner import workspaces as owner_workspaces
from tests.contract import cli_process, repositories, workspaces

Guest = workspaces.Guest
git = repositories.git


async def test_prepares_of_one_vm_wait_for_each_other(guest: Guest) -> None:
    repositories.plain(guest.source)
    await asyncio.gather(*(guest.prepare() for _ in range(4)))
    assert repositories.status(guest.repo) == repositories.status(guest.source)
    assert git(guest.repo, "fsck", "--full", "--no-dangling") == b""


@contextlib.asynccontextmanager
async def held(guest: Guest) -> AsyncIterator[None]:
    """A prepare of this process, whose client is as one that was stopped."""
    link = await websockets.unix_connect(
        str(guest.served.path), "ws://banger/v1/vms/web/workspace/prepare", compression=None
    )
    await link.send('{"path": "' + str(guest.repo) + '"}')
    assert "exists" in str(await link.recv())
    try:
        yield
    finally:
        await link.close()


@pytest.mark.parametrize("mode", [(), ("--mode", "full-copy")])
async def test_a_prepare_says_whom_it_waits_for_and_goes_on_when_that_ends(
    guest: Guest, mode: tuple[str, ...]
) -> None:
    repositories.plain(guest.source)
    cli = cli_process.Cli(guest.served.path)
    words = ("vm", "workspace", "prepare", "web", str(guest.source), "--guest-path", str(guest.repo), *mode)
    async with held(guest):
        waiting = await asyncio.create_subprocess_exec(
            *cli.argv(*words), env=cli.environment(), stderr=asyncio.subprocess.PIPE
        )
        assert waiting.stderr is not None
        said = (await waiting.stderr.readline()).decode()
        assert f"waiting for process {os.getpid()}, which prepares another workspace there" in said
    await waiting.communicate()
    assert waiting.returncode == 0
    assert (guest.repo / "README").exists()


async def test_a_prepare_waits_for_no_other_without_end(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_workspaces, "_TURN_S", 0.1)
    repositories.plain(guest.source)
    async with held(guest):
        refused = await guest.prepare(status=1)
    assert f"process {os.getpid()} still prepares a workspace of web" in refused.err
    await guest.prepare()
