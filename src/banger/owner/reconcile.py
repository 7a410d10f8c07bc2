# SPDX-License-Identifier: MIT
"""Where record and world are compared: once, when the daemon starts, before it serves anybody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Protocol

from banger.contract import errors, names, privileged, resources
from banger.owner import inventory
from banger.owner import store as stores
from banger.vm import host as hosts
from banger.vm import record, stop

_log = logging.getLogger(__name__)


class Vms(Protocol):
    """The part of the VM service that takes over what still runs."""

    def adopt(self, vm: record.VmRecord, vmm: privileged.Vmm, /) -> None: ...

    async def collect(self, vm: record.VmRecord, /) -> record.VmRecord: ...

    async def throw_away(self, vm: record.VmRecord, /) -> None: ...

    def try_again(self, vm_id: names.VmId, /) -> None: ...


async def reconcile(store: stores.Store, host: hosts.Host, vms: Vms) -> None:
    """Adopts each VM that still runs, takes away what does not, collects what no row owns.

    Deletes the VMs that were to end with the request of a client, which ended with the last daemon, and
    those that it was deleting.

    One VM or directory that cannot be cleaned up is logged and does not keep the daemon from starting. What
    is left of a VM is tried again, from when the daemon serves.
    """
    world = await host.privileged(privileged.ListWorld(settled=True))
    found = {seen.vm_id: seen for seen in world.vms}
    rows = {vm.id: vm for vm in store.list()}
    throw_aways = store.throw_aways()
    for vm in rows.values():
        if vm.id in throw_aways:
            await _guarded(vm.id, vms.throw_away(vm))
        elif not await _guarded(vm.id, _reconcile_row(vm, found.get(vm.id), host, vms)):
            vms.try_again(vm.id)
    for vm_id in found.keys() - rows.keys():
        if not await _guarded(vm_id, _collect_orphan(names.VmId(vm_id), host)):
            vms.try_again(names.VmId(vm_id))
    left = await asyncio.to_thread(inventory.disks_of_nobody, host.layout, set(rows))
    for path in left:
        await _guarded(path.name, stop.delete_disks(path))


async def _reconcile_row(
    vm: record.VmRecord, seen: privileged.VmWorld | None, host: hosts.Host, vms: Vms
) -> None:
    runs = seen is not None and seen.vmm_pid > 0
    if vm.state is resources.VmState.RUNNING and seen is not None and runs:
        vmm = await _found(vm, seen, host, vms)
        if vmm.pid:
            vms.adopt(vm, vmm)
            _log.info("vm adopted", extra={"vm": vm.id, "pid": vmm.pid})
            return
    if vm.state is resources.VmState.RUNNING:
        await _collect(vm, vms)
    elif seen is not None and not seen.is_empty:
        _log.info("tearing down what an interrupted operation left", extra={"vm": vm.id})
        await host.privileged(privileged.TearDown(vm_id=vm.id))


async def _found(
    vm: record.VmRecord, seen: privileged.VmWorld, host: hosts.Host, vms: Vms
) -> privileged.Vmm:
    """One that cannot be looked at now is watched as what it was seen to be a moment ago."""
    try:
        return await host.privileged(privileged.FindVmm(vm_id=vm.id))
    except errors.BangerError:
        vms.adopt(vm, privileged.Vmm(pid=seen.vmm_pid))
        raise


async def _collect(vm: record.VmRecord, vms: Vms) -> None:
    """What cannot be cleaned up now is watched like one that runs: that tries again until it is done."""
    try:
        await vms.collect(vm)
    except errors.BangerError:
        vms.adopt(vm, privileged.Vmm(pid=0))
        raise


async def _collect_orphan(vm_id: names.VmId, host: hosts.Host) -> None:
    _log.warning("collecting what no row owns", extra={"vm": vm_id})
    await inventory.collect_vm(host, vm_id)


async def _guarded(vm_id: str, work: Coroutine[None, None, None]) -> bool:
    """Whether it was done."""
    try:
        await work
        return True
    except Exception as error:
        _log.error("could not reconcile", extra={"vm": vm_id, "error": str(error)})
        return False
