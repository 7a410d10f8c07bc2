# SPDX-License-Identifier: MIT
"""Who is cancelled while a task of its own ends is cancelled all the same, and not before that has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from banger.contract import names
from banger.owner import live, silence
from banger.vm import readiness

VM = names.VmId("0123456789ab")


class Reluctant:
    """Waits for ever; once it is cancelled, it takes until it is let go."""

    def __init__(self) -> None:
        self.waits, self.ends, self.go = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.has_ended = False

    async def wait(self, *_: object) -> None:
        self.waits.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ends.set()
            await self.go.wait()
            self.has_ended = True


async def is_cancelled_as_it_ends(work: Callable[[], Awaitable[object]], task: Reluctant) -> None:
    caller = asyncio.ensure_future(work())
    async with asyncio.timeout(30):
        await task.ends.wait()
        caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
        task.go.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
    assert task.has_ended


async def test_a_start_whose_knock_at_the_agent_ends() -> None:
    knock = Reluctant()

    async def gone(_: names.VmId) -> None:
        await knock.waits.wait()

    agent = SimpleNamespace(health=knock.wait)
    host = SimpleNamespace(limits=SimpleNamespace(agent_s=60.0), vmm_gone=gone, agent=lambda _: agent)
    vm = SimpleNamespace(id=VM)
    await is_cancelled_as_it_ends(lambda: readiness.wait_for_agent(cast(Any, host), cast(Any, vm)), knock)


async def test_a_stop_whose_watch_ends() -> None:
    watch = Reluctant()

    async def settled(_: names.VmId) -> bool:
        return True

    agents = silence.SilenceWatch(lambda _: cast(Any, None), silent_after_s=3600)
    vmms = live.LiveVmms(watch.wait, settled, agents)
    vmms.add(VM, 1)
    await watch.waits.wait()
    await is_cancelled_as_it_ends(lambda: vmms.forget(VM), watch)
    await vmms.close()
