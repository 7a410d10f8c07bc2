# SPDX-License-Identifier: MIT
"""What `vm set`, or a start that failed, makes of a row. Pure; the caller saves it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from banger.contract import destinations, egress, errors, given_names, names, resources, sizes
from banger.vm import create, lifetime, record


def applied(
    vm: record.VmRecord,
    body: resources.SetVm,
    kernel_id: Callable[[str], names.KernelId],
    *,
    has_disk: bool,
) -> record.VmRecord:
    """Raises BadRequestError. `has_disk`: there is a work disk, and so something to lose on it."""
    asked = resources.SizeSource.REQUEST
    sources = dict(vm.sources)
    if body.vcpus is not None:
        vm, sources["vcpus"] = msgspec.structs.replace(vm, vcpus=body.vcpus), asked
    if body.memory_mib is not None:
        vm, sources["memory_mib"] = msgspec.structs.replace(vm, memory_mib=body.memory_mib), asked
    if body.disk_size_mib is not None:
        if body.disk_size_mib < vm.disk_size_mib and has_disk:
            raise errors.BadRequestError(
                f"the work disk of {vm.name} has {sizes.text_of_mib(vm.disk_size_mib)}; it can only grow",
                hint="what is on it would be lost; a smaller one is for a new VM, and `banger vm cp`",
            )
        vm, sources["disk_size_mib"] = msgspec.structs.replace(vm, disk_size_mib=body.disk_size_mib), asked
    if body.name is not None:
        vm = msgspec.structs.replace(vm, name=given_names.parse_vm_name(body.name))
    if body.kernel is not None:
        vm = msgspec.structs.replace(vm, kernel_id=kernel_id(body.kernel))
    return at_once(msgspec.structs.replace(vm, sources=sources), body)


def at_once(vm: record.VmRecord, body: resources.SetVm) -> record.VmRecord:
    """What a VM that runs can change. Raises BadRequestError."""
    vm = lifetime.limited(vm, idle_stop_s=body.idle_stop_s, ttl_s=body.ttl_s)
    if body.autostart is not None:
        vm = msgspec.structs.replace(vm, autostart=body.autostart)
    return _with_access(vm, body)


def _with_access(vm: record.VmRecord, body: resources.SetVm) -> record.VmRecord:
    """Raises BadRequestError."""
    allow = vm.allow if body.allow is None else create.allowed(body.allow)
    nat, mode = _opened(vm, body)
    if nat and not vm.network:
        raise errors.BadRequestError(f"{vm.name} has no network", hint="NAT needs a VM with one")
    create.require_ipv6(allow, has_ipv6=vm.ipv6)
    return msgspec.structs.replace(vm, nat=nat, egress=mode, allow=allow)


def _opened(vm: record.VmRecord, body: resources.SetVm) -> tuple[bool, egress.Egress]:
    """NAT and its mode. What is named means what it means on a new VM; what is taken away opens nothing."""
    if not (body.nat or body.egress or body.allow):
        return vm.nat and body.nat is not False, vm.egress
    only_nat = body.egress is None and body.allow is None
    if only_nat and vm.allow and vm.egress is egress.Egress.NONE:
        raise errors.BadRequestError(
            f"{vm.name} may reach only {', '.join(vm.allow)}; NAT alone does not say whether that stays so",
            hint="`--egress none` opens only these, `--egress internet` the internet too",
        )
    return destinations.opened(body.nat, body.egress, body.allow or ())


def failed(
    vm: record.VmRecord,
    error: BaseException,
    *,
    op_id: str,
    step: str,
    timings: tuple[resources.StepTiming, ...],
) -> record.VmRecord:
    """The row of a VM whose start did not work out."""
    return msgspec.structs.replace(
        vm,
        state=resources.VmState.ERROR,
        boot_id="",
        last_error=errors.to_body(_described(vm, error), op_id=op_id, step=step),
        last_start=timings,
        # A daemon that ends cancels it, and the next one tries again.
        stopped_with_host=vm.stopped_with_host and isinstance(error, asyncio.CancelledError),
    )


def _described(vm: record.VmRecord, error: BaseException) -> BaseException:
    """Cancellation has no message of its own; notes of failed undos go along."""
    if not isinstance(error, asyncio.CancelledError):
        return error
    known = errors.CancelledError(f"the start of {vm.name} was cancelled")
    for note in getattr(error, "__notes__", ()):
        known.add_note(note)
    return known
