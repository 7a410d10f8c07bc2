# SPDX-License-Identifier: MIT
"""What could not be taken away when it should have been: tried again until it is gone or the daemon ends."""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from banger.contract import names

_log = logging.getLogger(__name__)

_FIRST_DELAY_S: Final = 0.1
_LONGEST_DELAY_S: Final = 300.0


class TakeAway(Protocol):
    async def __call__(self, vm_id: names.VmId, /, *, whole: bool) -> None:
        """`whole`: the VM itself was to go. Raises as long as something is left."""


class Leftovers:
    """One task for each VM, whose pauses grow: a device may be busy, or the helper be restarting."""

    def __init__(self, take_away: TakeAway) -> None:
        self._take_away = take_away
        self._whole: set[names.VmId] = set()
        self._tasks: dict[names.VmId, asyncio.Task[None]] = {}

    def add(self, vm_id: names.VmId, *, whole: bool = False) -> None:
        """Again is fine."""
        if whole:
            self._whole.add(vm_id)
        if vm_id not in self._tasks:
            self._tasks[vm_id] = asyncio.create_task(self._work(vm_id), name=f"left-{vm_id}")

    async def close(self) -> None:
        """The next daemon finds what is left."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, vm_id: names.VmId) -> None:
        delay_s = _FIRST_DELAY_S
        try:
            while True:
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
                whole = vm_id in self._whole
                try:
                    await self._take_away(vm_id, whole=whole)
                except Exception as error:
                    fields = {"vm": vm_id, "error": str(error), "again_s": delay_s}
                    _log.warning("could not take away what is left; trying again", extra=fields)
                    continue
                if whole or vm_id not in self._whole:  # else it was to go wholly only since
                    _log.info("took away what was left", extra={"vm": vm_id})
                    return
        finally:
            del self._tasks[vm_id]
            self._whole.discard(vm_id)
