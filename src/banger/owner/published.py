# SPDX-License-Identifier: MIT
"""Keeps ports published as rows of running VMs want them: what another program had, what a change left half.

What is amiss is seen by each look, not told once: whoever is interrupted after a look loses nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, Protocol

from banger import steps
from banger.contract import names, resources
from banger.owner import locks, publish
from banger.vm import record

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0


class Rows(Protocol):
    """The part of the store that is read here."""

    def list(self) -> Sequence[record.VmRecord]: ...


class PortKeeper:
    """Acts on a row under its VM's lifecycle lock alone: before, it may change, or its VM end."""

    def __init__(self, publisher: publish.Publisher, rows: Rows, lifecycle: locks.Lifecycle) -> None:
        self._publisher = publisher
        self._rows = rows
        self._lifecycle = lifecycle
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="ports")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def look(self) -> None:
        """Opens and closes what it can. Who is at work on a VM does that itself, or the next look does."""
        running = self._running()
        for vm_id in {*running, *self._publisher.holders()}:
            is_amiss = not self._publisher.is_as(vm_id, running.get(vm_id))
            if is_amiss and self._lifecycle.holder(vm_id) is None:
                async with self._lifecycle.hold(vm_id, ""):
                    await steps.finish(self._mend(vm_id))

    async def _mend(self, vm_id: names.VmId) -> None:
        vm = self._running().get(vm_id)
        if vm is not None:
            await self._publisher.mend(vm)
        else:
            await self._publisher.release(vm_id)

    def _running(self) -> dict[names.VmId, record.VmRecord]:
        return {vm.id: vm for vm in self._rows.list() if vm.state is resources.VmState.RUNNING}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_AGAIN_S)  # nobody tells that a port is free
            try:
                await self.look()
            except Exception as error:
                # Whatever it was, such as a disk: this task ends with the daemon alone.
                _log.warning("published ports could not be looked at", extra={"error": str(error)})
