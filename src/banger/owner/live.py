# SPDX-License-Identifier: MIT
"""The VMMs that run now, each watched until the kernel says it ended. Rebuilt when the daemon starts."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from banger import steps
from banger.contract import names
from banger.owner import silence

_log = logging.getLogger(__name__)

_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 30.0

OnGone = Callable[[names.VmId], Awaitable[bool]]
"""True when that is settled; False while there is a VMM: one that is killed closes its sockets first."""


class LiveVmms:
    """Pids for showing only; every act on a VMM goes through the helper, which verifies it again."""

    def __init__(
        self,
        gone: Callable[[names.VmId], Awaitable[None]],
        on_gone: OnGone,
        agents: silence.SilenceWatch,
    ) -> None:
        self._gone = gone
        self._on_gone = on_gone
        self.agents = agents
        self._pids: dict[names.VmId, int] = {}
        self._watchers: dict[names.VmId, asyncio.Task[None]] = {}

    def pid(self, vm_id: names.VmId) -> int:
        """0 when none runs."""
        return self._pids.get(vm_id, 0)

    def add(self, vm_id: names.VmId, pid: int) -> None:
        self._pids[vm_id] = pid
        self.agents.add(vm_id)
        before = self._watchers.pop(vm_id, None)
        if before is not None:
            before.cancel()
        # Of no operation: the start ends, and with it what its id in the journal and its events are for.
        self._watchers[vm_id] = asyncio.create_task(
            self._watch(vm_id), name=f"watch-{vm_id}", context=contextvars.Context()
        )

    async def forget(self, vm_id: names.VmId) -> None:
        """Its end is about to be our own doing."""
        await self.ended(vm_id)
        watcher = self._watchers.pop(vm_id, None)
        if watcher is not None and watcher is not asyncio.current_task():
            watcher.cancel()
            await steps.finish(_ended(watcher))

    async def ended(self, vm_id: names.VmId) -> None:
        """There is no VMM any more. That its socket closed is not enough to say so."""
        self._pids.pop(vm_id, None)
        await self.agents.forget(vm_id)

    async def close(self) -> None:
        for vm_id in list(self._watchers):
            await self.forget(vm_id)

    async def _watch(self, vm_id: names.VmId) -> None:
        await self._gone(vm_id)
        try:
            await self._clean_up(vm_id)
        finally:
            if self._watchers.get(vm_id) is asyncio.current_task():
                del self._watchers[vm_id]

    async def _clean_up(self, vm_id: names.VmId) -> None:
        """Until it is done: the helper may be restarting, and a row must not go on saying what is not so."""
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                if await self._on_gone(vm_id):
                    return
            except Exception as error:
                fields = {"vm": vm_id, "error": str(error), "again_s": delay_s}
                _log.warning("could not clean up after a VMM that ended; trying again", extra=fields)
            await asyncio.sleep(delay_s)
            await self._gone(vm_id)
            delay_s = min(delay_s * 2, _LONGEST_DELAY_S)


async def _ended(watcher: asyncio.Task[None]) -> None:
    await asyncio.gather(watcher, return_exceptions=True)
