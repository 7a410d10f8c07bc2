# SPDX-License-Identifier: MIT
"""Ending a VM: orderly (flush, power off, wait), or by signal. Both leave nothing of its runtime behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from banger import steps
from banger.contract import errors, privileged, resources
from banger.vm import capabilities, host, record

_log = logging.getLogger(__name__)

T = TypeVar("T")
Mark = Callable[[record.VmRecord], record.VmRecord]


def _plain(vm: record.VmRecord) -> record.VmRecord:
    return vm


def _nobody(_: str) -> None:
    return


async def stop(
    host: host.Host,
    vm: record.VmRecord,
    features: Sequence[capabilities.Capability],
    *,
    tell: Callable[[str], None] = _nobody,
    mark: Mark = _plain,
) -> record.VmRecord:
    """Flushes the guest's file systems, asks it to power off, then ends the VMM; returns the saved row.

    A guest that does not answer is ended all the same, within the limits' sum; its last writes may be lost,
    which `tell` hears. `mark` is what the row of one that ran says besides: saved with it, never lost alone.
    """
    went_down = await _ask_guest(host, vm)
    if not went_down and vm.state is resources.VmState.RUNNING:
        tell(f"{vm.name} did not go down by itself and is ended: what was written last in it may be lost")
    return await steps.finish(_end(host, vm, features, lambda: _save_stopped(host, vm, mark)))


async def kill(
    host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]
) -> record.VmRecord:
    """Ends the VMM with SIGKILL, without a word to the guest; same clean-up as `stop`."""
    return await steps.finish(_end(host, vm, features, lambda: _save_stopped(host, vm)))


async def delete(host: host.Host, vm: record.VmRecord, features: Sequence[capabilities.Capability]) -> None:
    """Runtime and logs are gone; disks and row are the caller's, who deletes both last, or neither."""
    await steps.finish(_end(host, vm, features, lambda: _save_for_now(host, vm)))
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
    """Whether it went down.

    It is waited for whatever its agent says: one whose disk is slow flushes on as it unmounts, and where
    nobody answers it may be going down already, its agent among the first.
    """
    limits = host.limits
    agent = host.agent(vm.id)
    told: list[str] = []
    try:
        await agent.flush(deadline_s=limits.flush_s)
    except errors.BangerError as error:
        told.append(error.message)
    try:
        async with asyncio.timeout(limits.power_off_s + 1):
            try:
                await agent.power_off(grace_ms=int(limits.power_off_s * 1000))
            except errors.BangerError as error:
                told.append(error.message)
            await host.vmm_gone(vm.id)
        return True
    except TimeoutError:
        _log.warning(
            "guest did not power off by itself; ending its VMM",
            extra={"vm": vm.id, "error": "; ".join(told) or "it took too long"},
        )
        return False


async def _end(
    host: host.Host,
    vm: record.VmRecord,
    features: Sequence[capabilities.Capability],
    save: Callable[[], T],
) -> T:
    """Not to be cancelled in between: a row would say that it runs, and later that it ended by itself.

    So it would for one of which something is left: `save` says that it has stopped, then too.
    """
    await _kill(host, vm)
    try:
        await release(host, vm, features)
    except Exception as error:
        try:
            save()
        except errors.BangerError as second:
            error.add_note(f"keeping that {vm.name} has stopped: {second.message}")
        raise
    return save()


async def _kill(host: host.Host, vm: record.VmRecord) -> None:
    """A helper that ended once it had done so has not answered: it would pass for the VMM's own end."""
    try:
        await host.privileged(privileged.KillVmm(vm_id=vm.id))
    except errors.UnavailableError:
        with contextlib.suppress(errors.BangerError):
            if not (await host.privileged(privileged.FindVmm(vm_id=vm.id))).pid:
                return
        raise


def _save_for_now(host: host.Host, vm: record.VmRecord) -> None:
    """Of one whose row shall go too: where there is no room to write it, deleting makes some."""
    if vm.state is resources.VmState.RUNNING:
        with contextlib.suppress(errors.NoSpaceError):
            _save_stopped(host, vm)


def _kept(error: errors.ErrorBody | None) -> errors.ErrorBody | None:
    """Why it had ended before, until its next start. A start cut short, as by this stop, is no reason."""
    return None if error is not None and error.code == errors.CancelledError.code else error


def _save_stopped(host: host.Host, vm: record.VmRecord, mark: Mark = _plain) -> record.VmRecord:
    # Not the row of the beginning: a workspace may have arrived while the guest flushed.
    latest = host.records.get(vm.id)
    if isinstance(latest, record.Salvaged):
        return host.records.save_state(latest, resources.VmState.STOPPED)
    never_ran = latest.state is resources.VmState.CREATED
    stopped = msgspec.structs.replace(
        latest,
        state=latest.state if never_ran else resources.VmState.STOPPED,
        boot_id="",
        last_error=_kept(latest.last_error),
        stopped_with_host=False,
    )
    marked = mark(stopped) if latest.state is resources.VmState.RUNNING else stopped
    host.records.save(marked)
    return marked
