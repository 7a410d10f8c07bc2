# SPDX-License-Identifier: MIT
"""VMs over a restart of their host: stopped in order before it goes down, started again when it is back.

By itself a host that goes down ends its VMMs as if its guests' power had failed. So `banger-guests.service`,
which systemd stops first, has all VMs stopped here. Only in another boot of the host are they started again:
a daemon that is restarted while the host goes down must not do that.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, Protocol

from banger.contract import errors, resources, sizes
from banger.owner import operations, store
from banger.vm import record

_log = logging.getLogger(__name__)

_AT_ONCE: Final = 4
"""More would only make each boot slower, on a host that has just come up itself."""
_GONE: Final = errors.NotFoundError.code
"""Deleted meanwhile."""


class Vms(Protocol):
    """The part of the VM service that is needed here."""

    def is_up(self, vm: record.VmRecord, /) -> bool: ...

    async def stop_with_host(self, ref: str, /) -> resources.Operation: ...

    async def start(self, ref: str, /) -> resources.Operation: ...


class Restarts:
    """Of one host; `boot_id` is which boot of it this is, empty where nobody told."""

    def __init__(self, vms: Vms, rows: store.Store, running: operations.Operations, boot_id: str) -> None:
        self._vms = vms
        self._rows = rows
        self._operations = running
        self._boot_id = boot_id
        self._task: asyncio.Task[None] | None = None

    def begin_stopping(self) -> resources.Operation:
        return self._operations.start("host.stop_vms", "all VMs", self._stop_all)

    async def _stop_all(self, progress: operations.Progress) -> None:
        """And those that have begun to run meanwhile; what has not been started again yet stays down."""
        await self.close()
        seen: set[str] = set()
        failed: list[str] = []
        while up := [vm for vm in self._rows.list() if vm.id not in seen and self._is_to_stop(vm)]:
            seen.update(vm.id for vm in up)
            progress.stage(resources.Stage.STOP, f"stopping {sizes.counted(len(up), 'VM')}")
            begun = [await self._vms.stop_with_host(vm.id) for vm in up]
            ended = await asyncio.gather(*(self._operations.wait(each.id) for each in begun))
            failed += [each.target for each in ended if each.error is not None and each.error.code != _GONE]
        if failed:
            raise errors.OperationFailedError(
                f"not stopped in order: {', '.join(failed)}", hint="`banger vm explain NAME` says why"
            )

    def start(self) -> None:
        """In the background: nobody waits for a VM to be told that there is one."""
        waiting = [vm for vm in self._rows.list() if self._is_wanted(vm)]
        self._task = asyncio.create_task(self._start_all(waiting), name="restarts")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _is_to_stop(self, vm: record.VmRecord) -> bool:
        return self._vms.is_up(vm) or self._is_wanted(vm)

    def _is_wanted(self, vm: record.VmRecord) -> bool:
        is_other_boot = bool(self._boot_id) and vm.host_boot_id != self._boot_id
        return vm.autostart and vm.stopped_with_host and is_other_boot and not self._vms.is_up(vm)

    async def _start_all(self, waiting: list[record.VmRecord]) -> None:
        places = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for vm in waiting:
                group.create_task(self._start_one(vm, places))

    async def _start_one(self, vm: record.VmRecord, places: asyncio.Semaphore) -> None:
        async with places:
            try:
                if not self._is_wanted(self._rows.get(vm.id)):  # its user has decided since
                    return
                begun = await self._vms.start(vm.id)
                ended = await self._operations.wait(begun.id)
            except Exception as error:  # deleted meanwhile, or the daemon is going; no other waits for it
                fields = {"vm": vm.id, "error": str(error) or repr(error)}
                _log.warning("vm not started with its host", extra=fields)
                return
        is_up = ended.status is resources.OperationStatus.SUCCEEDED
        _log.log(
            logging.INFO if is_up else logging.ERROR,
            "vm started with its host" if is_up else "vm could not be started with its host",
            extra={"vm": vm.id, "op": begun.id},
        )
