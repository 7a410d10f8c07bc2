# SPDX-License-Identifier: MIT
"""What an earlier prepare still does in the guest, its daemon killed, is waited for by the next one."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.vm import workspace
from tests.contract import repositories, workspaces

_SOON_S = 1.5
"""An undisturbed prepare takes a third of it."""


@contextlib.contextmanager
def at_work(repo: Path) -> Iterator[None]:
    """A script of an earlier prepare, as far as others see it."""
    repo.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(repo.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


@pytest.mark.parametrize("mode", [(), ("--mode", "full-copy", "--discard")])
async def test_a_prepare_waits_for_what_an_earlier_one_left_at_work(
    guest: workspaces.Guest, mode: tuple[str, ...]
) -> None:
    repositories.plain(guest.source)
    with at_work(guest.repo):
        prepare = asyncio.create_task(guest.prepare(*mode))
        await asyncio.wait({prepare}, timeout=_SOON_S)
        assert not prepare.done()
        assert list(guest.repo.parent.iterdir()) == []
    await prepare
    assert (guest.repo / "README").read_bytes() == (guest.source / "README").read_bytes()


async def test_one_that_does_not_end_is_said(
    guest: workspaces.Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    repositories.plain(guest.source)
    hasty = workspace.INSPECT.replace("-lt 100", "-lt 2")
    assert hasty != workspace.INSPECT
    monkeypatch.setattr(workspace, "INSPECT", hasty)
    with at_work(guest.repo):
        refused = await guest.prepare(status=1)
    assert "an earlier prepare is still at work" in refused.err
    await guest.prepare()
