# SPDX-License-Identifier: MIT
"""Ending a VM: orderly (flush, power off, wait), or by signal. Both leave nothing of its runtime behind."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from banger.contract import errors, privileged, resources
from banger.vm import capabilities, host, record

_log = logging.getLogger(__name__)


def _nobody(_: str) -> None:
    return


async def stop(
    host: host.Host,
    vm: record.VmRecord,
    features: Sequence[capabilities.Capability],
    *,
    tell: Callable[[str], None] = _nobody,
) -> record.VmRecord:
    """Flushes the guest's file systems, asks it to power off, then ends the VMM; returns the saved row.

    A guest that does not answer is ended all the same, within the limits' sum; its last writes may be lost,
    which `tell` hears.
    """
    went_down = await _ask_guest(host, vm)
    if not went_down and vm.state is resources.VmState.RUNNING:
        tell(f"{vm.name} did not go down by itself and is ended: what was written last in it may be lost")
    return await _end(host, vm, features)


async def kill(
    host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]
) -> record.VmRecord:
    """Ends the VMM with SIGKILL, without a word to the guest; same clean-up as `stop`."""
    await host.privileged(privileged.KillVmm(vm_id=vm.id, force=True))
    return await _end(host, vm, features)


async def delete(host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]) -> None:
    """Runtime and logs are gone; disks and row are the caller's, who deletes both last, or neither."""
    await host.privileged(privileged.KillVmm(vm_id=vm.id, force=True))
    await release(host, vm, features)
    await host.privileged(privileged.PurgeLogs(vm_id=vm.id))


async def delete_disks(directory: Path) -> None:
    """Raises OperationFailedError: something else may be mounted there, or hold it open."""
    try:
        await asyncio.to_thread(shutil.rmtree, directory)
    except OSError as error:
        why = error.strerror or str(error)
        raise errors.OperationFailedError(
            f"{directory} cannot be deleted: {why}",
            hint="is something mounted there, or its disk read-only?",
        ) from error


async def release(host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]) -> None:
    """Capabilities first, then whatever else the helper finds under this VM's id."""
    await capabilities.clean_up_all(features, capabilities.Context(host=host, vm=vm))
    await host.privileged(privileged.TearDown(vm_id=vm.id))


async def take_down(
    host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]
) -> None:
    """What is left of a start whose rollback failed. Root's part first: a VMM may hold the rest."""
    await host.privileged(privileged.TearDown(vm_id=vm.id))
    await capabilities.clean_up_all(features, capabilities.Context(host=host, vm=vm))


async def _ask_guest(host: host.Host, vm: record.VmRecord) -> bool:
    """Whether it went down."""
    limits = host.limits
    agent = host.agent(vm.id)
    try:
        await agent.flush(deadline_s=limits.flush_s)
        await agent.power_off(grace_ms=int(limits.power_off_s * 1000))
        async with asyncio.timeout(limits.power_off_s + 1):
            await host.vmm_gone(vm.id)
        return True
    except (errors.BangerError, TimeoutError) as error:
        _log.warning(
            "guest did not power off by itself; ending its VMM",
            extra={"vm": vm.id, "error": str(error) or "it took too long"},
        )
        return False


async def _end(
    host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]
) -> record.VmRecord:
    await host.privileged(privileged.KillVmm(vm_id=vm.id, force=True))
    await release(host, vm, features)
    # Not the row of the beginning: a workspace may have arrived while the guest flushed.
    latest = host.records.get(vm.id)
    stopped = msgspec.structs.replace(
        latest,
        state=resources.VmState.STOPPED,
        boot_id="",
        last_error=None,
        stopped_with_host=False,
    )
    host.records.save(stopped)
    return stopped
