# SPDX-License-Identifier: MIT
"""How VMs end: by our doing or by their own; and what is left of one is looked after until it is gone.

Whoever has started a VM hands it over to `live` here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from banger import steps
from banger.contract import errors, names, privileged, resources
from banger.owner import activity, inventory, leftovers, live, locks, silence, ssh, store
from banger.vm import capabilities, ending, host, record, stop
from banger.vm.capabilities import dns

_log = logging.getLogger(__name__)

_RUNNING: Final = resources.VmState.RUNNING
How = Callable[[host.Host, record.VmRecord, Sequence[capabilities.Capability]], Awaitable[record.VmRecord]]


class Endings:
    """Meets reconcile's `Vms` and the inventory's."""

    def __init__(
        self,
        *,
        host: host.Host,
        rows: store.Store,
        lifecycle: locks.Lifecycle,
        features: Sequence[capabilities.Capability],
        keys: ssh.SshKeys,
        zone: dns.Zone,
        activities: activity.Activities,
        agents: silence.SilenceWatch,
    ) -> None:
        self._host = host
        self._rows = rows
        self._lifecycle = lifecycle
        self._features = features
        self._keys = keys
        self._zone = zone
        self._activities = activities
        self.leftovers = leftovers.Leftovers(self._take_away)
        self.live = live.LiveVmms(host.vmm_gone, self._on_vmm_gone, agents)

    # --- under the lock of who calls ---

    async def stop(self, vm: record.VmRecord, how: How) -> record.VmRecord:
        """One that had ended already, and was not noticed yet, keeps why."""
        async with self._ending(vm):
            if vm.state is _RUNNING and not await self._has_vmm(vm.id):
                vm = await steps.finish(self.collect(vm))
            stopped = await how(self._host, vm, self._features)
        _log.info("vm stopped", extra={"vm": vm.id})
        return stopped

    async def delete(self, vm: record.VmRecord) -> None:
        try:
            async with self._ending(vm):
                await stop.delete(self._host, vm, self._features)
                await steps.finish(self._forget(vm))
        except Exception:
            if vm.id in self._rows.throw_aways():
                self.leftovers.add(vm.id, whole=True)
            raise
        _log.info("vm deleted", extra={"vm": vm.id, "vm_name": vm.name})

    async def collect(self, vm: record.VmRecord) -> record.VmRecord:
        """Takes away what a dead VMM left and says in the row how it ended."""
        await stop.release(self._host, vm, self._features)
        # Not the row of the beginning: a workspace may have arrived meanwhile.
        latest = self._rows.get(vm.id)
        ended = ending.ended(latest, self._host.layout.logs / vm.id, self._host.boot_id)
        if isinstance(latest, record.Salvaged):
            ended = self._rows.save_state(latest, ended.state)
        else:
            self._rows.save(ended)
        _log.warning("vmm ended by itself", extra={"vm": vm.id, "state": str(ended.state)})
        return ended

    # --- the daemon's start ---

    def adopt(self, vm: record.VmRecord, vmm: privileged.Vmm) -> None:
        """A VMM that outlived the last daemon is ours again; one that is none is only watched.

        Its name before anything else may come: should it end now, that takes the name away, and for good.
        """
        if vmm.pid:
            self._zone.add(vm)
        self.live.add(vm.id, vmm.pid)

    async def throw_away(self, vm: record.VmRecord) -> None:
        """The client whose command it ran for left with the last daemon, or that one was deleting it."""
        await self.delete(vm)

    # --- what is left over ---

    def holder(self, vm_id: names.VmId) -> str | None:
        """The operation that works on it now; None when none does."""
        return self._lifecycle.holder(vm_id)

    async def take_down(self, vm_id: names.VmId) -> None:
        """Nothing of a VM that does not run stays but its disks and logs: no port and no name either."""
        async with self._lifecycle.hold(vm_id, ""):
            if not self._rows.has(vm_id):
                return  # deleted while we waited, with all that it had
            vm = self._rows.get(vm_id)
            if vm.state is not _RUNNING:
                await stop.take_down(self._host, vm, self._features)
            elif not await self._has_vmm(vm_id):
                async with self._ending(vm):
                    await self.collect(vm)

    def try_again(self, vm_id: names.VmId) -> None:
        """Later: what is on the host under this id, and should not be, could not be taken away now."""
        self.leftovers.add(vm_id)

    async def close(self) -> None:
        """Stops watching; running VMs are left alone."""
        await self.leftovers.close()
        await self.live.close()

    # --- inside ---

    async def _take_away(self, vm_id: names.VmId, *, whole: bool) -> None:
        rows = {vm.id: vm for vm in self._rows.list()}
        if vm_id not in rows:
            await inventory.collect_vm(self._host, vm_id)
        elif whole and vm_id in self._rows.throw_aways():
            async with self._lifecycle.hold(vm_id, ""):
                await self.delete(self._rows.get(vm_id))
        else:
            await self.take_down(vm_id)

    async def _forget(self, vm: record.VmRecord) -> None:
        if self._host.layout.vm_dir(vm.id).is_dir():
            await self._delete_disks(vm)
        self._keys.forget(vm.name)
        self._rows.delete(vm.id)
        self._activities.forget(vm.id)

    async def _delete_disks(self, vm: record.VmRecord) -> None:
        """What is cut off here is gone on with by the next daemon: half a VM is of no use to anybody."""
        directory = self._host.layout.vm_dir(vm.id)
        was_to_go, before = vm.id in self._rows.throw_aways(), set(directory.iterdir())
        self._rows.set_throw_away(vm.id, throw_away=True, lasts=True)
        try:
            await stop.delete_disks(directory)
        except errors.OperationFailedError:
            if not was_to_go and before == set(directory.iterdir()):
                self._rows.set_throw_away(vm.id, throw_away=False, lasts=True)
            raise

    async def _on_vmm_gone(self, vm_id: names.VmId) -> bool:
        """It was not asked to end by us, or by an operation that failed and left a row that is not true."""
        async with self._lifecycle.hold(vm_id, ""):
            running = [vm for vm in self._rows.list() if vm.id == vm_id and vm.state is _RUNNING]
            if running and await self._has_vmm(vm_id):
                return False
            await self.live.ended(vm_id)
            for vm in running:
                await self.collect(vm)
            return True

    async def _has_vmm(self, vm_id: names.VmId) -> bool:
        return (await self._host.privileged(privileged.FindVmm(vm_id=vm_id))).pid != 0

    @contextlib.asynccontextmanager
    async def _ending(self, vm: record.VmRecord) -> AsyncIterator[None]:
        """Its VMM ends by our own doing in this block; when that fails, it, or its rest, is looked after."""
        pid = self.live.pid(vm.id)
        try:
            await self.live.forget(vm.id)
            yield
        except BaseException as error:
            if vm.state is _RUNNING:
                self.live.add(vm.id, pid)
            if isinstance(error, Exception):
                self.leftovers.add(vm.id)
            raise
