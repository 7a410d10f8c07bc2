# SPDX-License-Identifier: MIT
"""Keeps the packet rules of running VMs as their rows want them, whatever becomes of the host's firewall.

What is missing is seen by each look, not told once: whoever is interrupted after a look loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Container, Iterable, Sequence
from typing import Final, Protocol

from banger import steps
from banger.contract import errors, names, privileged, resources
from banger.owner import locks
from banger.vm import record
from banger.vm.capabilities import packet_rules

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 30.0


class Rows(Protocol):
    """The part of the store that is read here."""

    def list(self) -> Sequence[record.VmRecord]: ...


class NetworkKeeper:
    """Meets the host's Keeper. Acts on a row under its VM's lifecycle lock alone: before, it may change."""

    def __init__(
        self,
        ops: privileged.PrivilegedOps,
        rows: Rows,
        lifecycle: locks.Lifecycle,
        *,
        again_s: float = _AGAIN_S,
    ) -> None:
        self._ops = ops
        self._rows = rows
        self._lifecycle = lifecycle
        self._again_s = again_s
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._unsure: set[names.VmId] = set()
        """Whose rules may be others than the row wants: root was told, and has not said that it is so."""
        self.doubts = 0
        """How many looks found rules missing, or found out nothing."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="network-keeper")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def restore(self) -> None:
        """Sets the rules of all that run. One that fails is logged and keeps none from its own."""
        await self._set([vm.id for vm in networked(self._rows)])

    async def set_rules(self, vm: record.VmRecord) -> None:
        """As the row wants them, or an error. After one each look sets them again, as the row is by then."""
        self._unsure.add(vm.id)
        await steps.finish(self._set_rules(vm))

    async def ensure(self) -> None:
        """Bridge and tables are there. Who runs without its rules is given them soon, by another task."""
        await steps.finish(self._ensure())

    def look_again(self) -> None:
        self._wanted.set()

    async def _ensure(self) -> None:
        if await self._look():
            self.look_again()

    async def _look(self) -> Sequence[names.VmId]:
        """The VMs that run and may lack their rules."""
        try:
            ensured = await self._ops.call(privileged.EnsureBridge())
            lacking = self._lacking(ensured.with_rules)
        except BaseException:
            self.doubts += 1
            raise
        if lacking or ensured.rebuilt:
            self.doubts += 1
        return lacking

    async def _mend(self) -> None:
        try:
            lacking = await self._look()
        except errors.BangerError as error:
            # The tables may be there all the same, empty, and what failed be another firewall's doing.
            _log.warning("the network could not be made whole", extra={"error": error.message})
            world = await self._ops.call(privileged.ListWorld())
            lacking = self._lacking({seen.vm_id for seen in world.vms if seen.rules})
        await self._set(lacking)

    def _lacking(self, with_rules: Container[str]) -> list[names.VmId]:
        running = [vm.id for vm in networked(self._rows)]
        self._unsure.intersection_update(running)
        return [vm_id for vm_id in running if vm_id not in with_rules or vm_id in self._unsure]

    async def _set(self, vm_ids: Iterable[names.VmId]) -> None:
        for vm_id in vm_ids:
            # An operation on one that runs ends it or sets them itself; the next look sees which.
            if self._lifecycle.holder(vm_id):
                continue
            async with self._lifecycle.hold(vm_id, ""):
                for vm in (each for each in networked(self._rows) if each.id == vm_id):
                    try:
                        await self.set_rules(vm)
                    except errors.BangerError as error:
                        fields = {"vm": vm.id, "error": error.message}
                        _log.error("packet rules could not be set", extra=fields)

    async def _set_rules(self, vm: record.VmRecord) -> None:
        await self._ops.call(packet_rules.request(vm))
        self._unsure.discard(vm.id)

    async def _watch(self) -> None:
        """Nothing tells when another firewall is loaded anew, so it is looked at while VMs depend on it."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._again_s):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                if networked(self._rows):
                    await self._mend()
            except Exception as error:
                # Whatever it was, a disk or the helper: this task ends with the daemon alone.
                _log.warning("the network could not be looked at", extra={"error": str(error)})


def networked(rows: Rows) -> list[record.VmRecord]:
    """The VMs with a network that run now."""
    return [vm for vm in rows.list() if vm.network and vm.state is resources.VmState.RUNNING]
