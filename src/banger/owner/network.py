# SPDX-License-Identifier: MIT
"""Keeps the packet rules of running VMs as their rows want them, whatever becomes of the host's firewall."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from banger.contract import errors, privileged
from banger.vm import record
from banger.vm.capabilities import packet_rules

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 30.0


class NetworkKeeper:
    """`running` are the VMs with a network that run now."""

    def __init__(
        self, ops: privileged.PrivilegedOps, running: Callable[[], Sequence[record.VmRecord]]
    ) -> None:
        self._ops = ops
        self._running = running
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="network-keeper")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def restore(self) -> None:
        """Sets the rules of all that run. One that fails is logged and keeps none from its own."""
        for vm in self._running():
            try:
                await self._ops.call(packet_rules.request(vm))
            except errors.BangerError as error:
                _log.error("packet rules could not be set", extra={"vm": vm.id, "error": error.message})

    async def ensure(self) -> None:
        """Bridge and tables are there, with the rules of all that run."""
        ensured = await self._ops.call(privileged.EnsureBridge())
        if ensured.rebuilt:
            await self.restore()

    async def _watch(self) -> None:
        """Nothing tells when another firewall is loaded anew, so it is looked at while VMs depend on it."""
        while True:
            await asyncio.sleep(_AGAIN_S)
            if not self._running():
                continue
            try:
                await self.ensure()
            except errors.BangerError as error:
                _log.warning("the network could not be looked at", extra={"error": error.message})
