# SPDX-License-Identifier: MIT
"""VMs that are made for one command whose client may be gone before the command begins: they go as well."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from banger.contract import errors, names

_log = logging.getLogger(__name__)

WITHIN_S: Final = 60.0


class Claims:
    """A VM that is `expect`ed to be claimed is deleted unless it is, `within_s` after it was there."""

    def __init__(self, delete: Callable[[names.VmId], Awaitable[object]]) -> None:
        self.within_s = WITHIN_S
        self._delete = delete
        self._waiting: dict[names.VmId, asyncio.Task[None]] = {}
        self._claimed: set[names.VmId] = set()

    def expect(self, vm_id: names.VmId) -> None:
        """One whose client came before it was there is not waited for."""
        if vm_id in self._claimed:
            return
        self._waiting[vm_id] = asyncio.create_task(self._wait(vm_id), name=f"unclaimed-{vm_id}")

    def claimed(self, vm_id: names.VmId) -> None:
        """One that nobody waits for is fine."""
        self._claimed.add(vm_id)
        self._end_waiting(vm_id)

    def left(self, vm_id: names.VmId) -> None:
        """Who claimed it; it goes with them."""
        self._claimed.discard(vm_id)

    def _end_waiting(self, vm_id: names.VmId) -> None:
        waiting = self._waiting.pop(vm_id, None)
        if waiting is not None:
            waiting.cancel()

    async def close(self) -> None:
        """What was not claimed is left to the next daemon, whose clients are others."""
        waiting = list(self._waiting.values())
        for vm_id in list(self._waiting):
            self._end_waiting(vm_id)
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _wait(self, vm_id: names.VmId) -> None:
        await asyncio.sleep(self.within_s)
        self._waiting.pop(vm_id, None)
        _log.warning("nobody came for a vm", extra={"vm": vm_id, "after_s": self.within_s})
        try:
            await self._delete(vm_id)
        except errors.BangerError as error:
            _log.info("it was not deleted", extra={"vm": vm_id, "error": error.message})
