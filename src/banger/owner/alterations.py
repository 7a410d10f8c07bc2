# SPDX-License-Identifier: MIT
"""What changes a VM without starting or ending it: its sizes, its name, what it reaches, its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from banger.contract import errors, names, ports, resources
from banger.owner import activity, changes, locks, publish, ssh, store
from banger.vm import create, host, lifetime, record
from banger.vm.capabilities import dns


class Alterations:
    """Each is over at once, and is refused while an operation holds the VM."""

    def __init__(
        self,
        *,
        host: host.Host,
        rows: store.Store,
        lifecycle: locks.Lifecycle,
        view: Callable[[record.VmRecord], resources.Vm],
        kernel_id: Callable[[str], names.KernelId],
        require_unawaited: Callable[[str], None],
        publisher: publish.Publisher,
        keys: ssh.SshKeys,
        zone: dns.Zone,
        activities: activity.Activities,
    ) -> None:
        self._host = host
        self._rows = rows
        self._lifecycle = lifecycle
        self._view = view
        self._kernel_id = kernel_id
        self._require_unawaited = require_unawaited
        self._publisher = publisher
        self._keys = keys
        self._zone = zone
        self._activities = activities

    async def set(self, ref: str, body: resources.SetVm) -> resources.Vm:
        """Raises ConflictError while an operation holds the VM, or for what a running one cannot change."""
        vm = self._rows.find(ref)
        vm.require_readable()
        create.require_opened(body.allow or (), self._host.names_closed)
        self._require_idle(vm)
        runs = vm.state is resources.VmState.RUNNING
        if runs and body.needs_no_stop:
            return await self._set_at_once(vm.id, body)
        if runs:
            raise errors.ConflictError(
                f"{vm.name} cannot be changed while it runs",
                hint=f"stop it first: `banger vm stop {vm.name}`",
            )
        has_disk = self._host.layout.work_disk(vm.id).exists()
        changed = changes.applied(vm, body, self._kernel_id, has_disk=has_disk)
        if changed.name != vm.name:
            self._require_unawaited(changed.name)
        if changed.autostart and not vm.autostart and vm.host_boot_id != self._host.boot_id:
            # It ran when an earlier boot of its host ended, and not when this one will.
            changed = msgspec.structs.replace(changed, stopped_with_host=False)
        self._rows.save(changed)
        if changed.name != vm.name:
            for name in (vm.name, changed.name):
                self._keys.forget(name)
        return self._view(changed)

    async def _set_at_once(self, vm_id: names.VmId, body: resources.SetVm) -> resources.Vm:
        """The row first: if we die in between, the next daemon does what it says."""
        async with self._lifecycle.hold(vm_id, ""):
            vm = self._rows.get(vm_id)
            changed = changes.at_once(vm, body)
            self._rows.save(changed)
            self._activities.of(vm_id).touch()
            if changed.state is resources.VmState.RUNNING and body.changes_egress:
                async with self._zone.changing(vm_id):
                    try:
                        await self._host.keeper.set_rules(changed)
                    except errors.BangerError:
                        self._rows.save(vm.with_what_arrived(self._rows.get(vm_id)))
                        self._host.keeper.look_again()  # root may have opened it all the same
                        raise
                    self._zone.add(changed)
            return self._view(changed)

    async def extend(self, ref: str, body: resources.ExtendVm) -> resources.Vm:
        """Raises ConflictError while it is being stopped or changed."""
        found = self._rows.find_running(ref)
        found.require_readable()
        self._require_idle(found)
        async with self._lifecycle.hold(found.id, ""):
            vm = lifetime.extended(self._rows.find_running(found.id), body.by_s)
            self._rows.save(vm)
            self._activities.of(vm.id).touch()
            return self._view(vm)

    async def change_ports(self, ref: str, body: ports.ChangePorts) -> resources.Vm:
        """Raises AlreadyExistsError for a port in use; nothing has changed then.

        The row first: if we die in between, the next daemon does what it says.
        """
        gone = set(ports.parse_all(body.unpublish))
        found = self._rows.find(ref)
        found.require_readable()
        self._require_idle(found)
        async with self._lifecycle.hold(found.id, ""):
            vm = self._rows.get(found.id)
            kept = [each for each in ports.parse_all(vm.publish) if each not in gone]
            fresh = [each for each in ports.parse_all(body.publish) if each not in kept]
            _require_unpublished(vm.name, kept, fresh)
            wanted = ports.parse_all(tuple(map(str, (*kept, *fresh))))
            changed = msgspec.structs.replace(vm, publish=tuple(map(str, wanted)))
            if vm.state is not resources.VmState.RUNNING:
                for each in fresh:
                    self._publisher.require_free(each)
            self._rows.save(changed)
            if vm.state is resources.VmState.RUNNING:
                try:
                    await self._publisher.serve(changed)
                except BaseException:
                    latest = self._rows.get(vm.id)
                    self._rows.save(msgspec.structs.replace(latest, publish=vm.publish))
                    raise
            return self._view(self._rows.get(vm.id))

    def _require_idle(self, vm: record.VmRecord) -> None:
        """Raises ConflictError while an operation holds it, whatever its row says meanwhile."""
        if operation := self._lifecycle.holder(vm.id):
            raise errors.ConflictError(
                f"operation {operation} is at work on {vm.name} now",
                hint="wait until it has ended",
                operation=operation,
            )


def _require_unpublished(vm: str, kept: Iterable[ports.Publish], fresh: Iterable[ports.Publish]) -> None:
    """Raises AlreadyExistsError for a port of the host that leads to another one of the same VM."""
    taken = {each.place: each for each in kept}
    for each in fresh:
        if each.place in taken:
            raise errors.AlreadyExistsError(
                f"port {each.place} of this host is published by {vm} already, "
                f"for its port {taken[each.place].guest_port}",
                hint="choose another port, or take that one back: "
                f"`banger vm unpublish {vm} {taken[each.place]}`",
            )
