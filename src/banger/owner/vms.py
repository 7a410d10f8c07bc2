# SPDX-License-Identifier: MIT
"""The VM service: turns API requests into operations on rows, under each VM's lifecycle lock.

Here VMs come, start, end and go. How they end, also by themselves, is in `endings.py`; what changes one that
stays as it is, in `alterations.py`; what is done inside one that runs, in `sessions.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import msgspec

from banger import steps
from banger.contract import errors, given_names, names, ports, resources
from banger.images import bundle
from banger.owner import (
    activity,
    admission,
    alterations,
    changes,
    endings,
    lifetimes,
    locks,
    operations,
    publish,
    pulse,
    sessions,
    silence,
    ssh,
    store,
    usage,
    views,
)
from banger.owner import guest as guests
from banger.vm import capabilities, create, host, record, start, stop, timeline
from banger.vm.capabilities import dns

_log = logging.getLogger(__name__)

_RUNNING: Final = resources.VmState.RUNNING
_STARTING: Final = resources.STARTS
_ORDERLY: Final = functools.partial(stop.stop, tell=operations.note)
LogFile = tuple[Path, Callable[[], bool]]
Work = Callable[[operations.Progress, record.VmRecord], Awaitable[resources.Vm | None]]


class Resolver(Protocol):
    """Applies defaults to a request: image, kernel and sizes, each with its source. Raises NotFoundError."""

    def resolve(self, body: resources.CreateVm, /) -> create.Resolved: ...

    def missing(self, body: resources.CreateVm, /) -> Sequence[operations.Work]: ...

    def kernel_id(self, ref: str, /) -> names.KernelId: ...

    async def require_programs(self, image_id: names.ImageId, body: resources.CreateVm, /) -> None: ...

    def run_config(self, image_id: names.ImageId, /) -> bundle.RunConfig: ...


class VmService:
    """Everything the API can do to VMs. Long work returns its operation at once."""

    def __init__(
        self,
        *,
        host: host.Host,
        store: store.Store,
        operations: operations.Operations,
        lifecycle: locks.Lifecycle,
        resolver: Resolver,
        views: views.Views,
        connect: Callable[[names.VmId], guests.GuestClient],
        features: Sequence[capabilities.Capability],
        publisher: publish.Publisher,
        keys: ssh.SshKeys,
        zone: dns.Zone,
        activities: activity.Activities,
        memory: admission.Memory,
    ) -> None:
        self._host = host
        self._memory = memory
        self._store = store
        self._operations = operations
        self._resolver = resolver
        self._views = views
        self._connect = connect
        self._features = features
        self._publisher = publisher
        self._keys = keys
        self.activities = activities
        self._notices = lifetimes.Notices()
        self.lifetimes = lifetimes.Lifetimes(
            lambda: [vm for vm in store.list() if vm.state is _RUNNING],
            activities,
            self._notices,
            self.stop_when_due,
        )
        self._lifecycle = lifecycle
        self.sessions = sessions.Sessions(
            store, connect, resolver.run_config, self._notices, self.delete, publisher.served
        )
        self.alterations = alterations.Alterations(
            host=host,
            rows=store,
            lifecycle=self._lifecycle,
            view=self._view,
            kernel_id=resolver.kernel_id,
            require_unawaited=self._require_unawaited,
            publisher=publisher,
            keys=keys,
            zone=zone,
            activities=activities,
        )
        agents = silence.SilenceWatch(
            lambda vm_id: pulse.of(host, vm_id),
            silent_after_s=host.limits.agent_silence_s,
            tell=self._tell_of_silence,
        )
        self.endings = endings.Endings(
            host=host,
            rows=store,
            lifecycle=lifecycle,
            features=features,
            keys=keys,
            zone=zone,
            activities=activities,
            agents=agents,
        )

    # --- reading ---

    async def list(self) -> list[resources.Vm]:
        views = self._views.remembering()
        return [views.vm(vm, self._seen(vm)) for vm in self._store.list()]

    async def get(self, ref: str) -> resources.Vm:
        return self._view(self._store.find(ref), with_timings=True)

    async def stats(self, ref: str) -> resources.VmStats:
        vm = self._store.find_running(ref)
        health = await self._connect(vm.id).health()
        return self._views.stats(vm, self.endings.live.pid(vm.id), usage.of(vm.id), health)

    async def log_file(self, ref: str, source: str, *, previous: bool = False) -> LogFile:
        """And whether its VM is still there, whenever that is asked."""
        vm = self._store.find(ref)
        path = self._host.layout.logs / vm.id / f"{source}.log{'.1' if previous else ''}"
        return path, functools.partial(self._store.has, vm.id)

    # --- life cycle ---

    async def create(self, body: resources.CreateVm) -> resources.Operation:
        """The row is reserved before this returns; an invalid request leaves none."""
        name = self._free_name(body.name)
        create.require_opened(body.allow, self._host.names_closed)
        missing = self._resolver.missing(body)
        for each in ports.parse_all(body.publish):
            self._publisher.require_free(each)
        if missing:
            return self._create_with(missing, name, body)
        vm = await self._reserve(name, body)
        return self._operations.start("vm.create", name, lambda progress: self._created(vm, body, progress))

    def _create_with(
        self, missing: Sequence[operations.Work], name: names.VmName, body: resources.CreateVm
    ) -> resources.Operation:
        """Gets kernel and image first. The row is made when they are there; the name is kept until then."""

        async def work(progress: operations.Progress) -> resources.Vm:
            for obtain in missing:
                await obtain(progress)
            return await self._created(await self._reserve(name, body), body, progress)

        return self._operations.start("vm.create", name, work)

    def _free_name(self, wanted: str | None) -> names.VmName:
        """Raises AlreadyExistsError. One whose image is still being got is taken, and has no row yet."""
        taken = self._store.taken_names()
        if not wanted:
            return create.new_name(taken | self._awaited_names())
        name = given_names.parse_vm_name(wanted)
        if name in taken:
            raise store.name_taken(name)
        self._require_unawaited(name)
        return name

    def _require_unawaited(self, name: str) -> None:
        if name in self._awaited_names():
            raise errors.AlreadyExistsError(
                f"a VM named {name} is being made already", hint="choose another name, or leave it out"
            )

    def _awaited_names(self) -> set[str]:
        creates = (each for each in self._operations.list() if each.kind == "vm.create")
        return {each.target for each in creates if not each.status.is_final}

    async def _reserve(self, name: names.VmName, body: resources.CreateVm) -> record.VmRecord:
        resolved = self._resolver.resolve(body)
        if body.needs_git or body.needs_mise:
            await self._resolver.require_programs(resolved.image_id, body)
            resolved = self._resolver.resolve(body)  # it may have been deleted meanwhile
        vm_id, now = names.VmId(names.new_id()), datetime.datetime.now(datetime.UTC)
        for each in resolved.publish:
            self._publisher.require_free(ports.parse(each))
        self._operations.require_open()
        return self._store.reserve(
            lambda slot: create.draft(vm_id, name, slot, resolved, now), throw_away=body.remove_on_failure
        )

    async def _created(
        self, vm: record.VmRecord, body: resources.CreateVm, progress: operations.Progress
    ) -> resources.Vm:
        async with self._lifecycle.hold(vm.id, progress.op_id):
            vm = self._store.get(vm.id)  # it may have been set meanwhile
            self._keys.forget(vm.name)
            view = self._view(vm)
            if body.start:
                view = await self._start(vm, progress, remove_on_failure=body.remove_on_failure)
            if body.for_command:
                self.sessions.claims.expect(vm.id)
                if not body.remove_on_failure:
                    self._store.set_throw_away(vm.id, throw_away=True, lasts=True)
            elif body.remove_on_failure:
                self._keep(vm.id)
            return view

    def _keep(self, vm_id: names.VmId) -> None:
        """One of which that cannot be written goes now: the next daemon would take what was done in it."""
        try:
            self._store.set_throw_away(vm_id, throw_away=False, lasts=True)
        except errors.BangerError:
            self.endings.leftovers.add(vm_id, whole=True)
            raise

    async def start(self, ref: str) -> resources.Operation:
        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            vm.require_readable()
            if vm.state is _RUNNING:
                raise errors.ConflictError(f"{vm.name} is running already")
            return await self._start(vm, progress)

        return self._lifecycle_operation("vm.start", ref, work)

    async def stop(self, ref: str) -> resources.Operation:
        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            progress.stage(resources.Stage.STOP, f"stopping {vm.name}")
            self._notices.tell(vm.id, f"{vm.name} is being stopped")
            return self._view(await self.endings.stop(vm, _ORDERLY))

        return self._lifecycle_operation("vm.stop", ref, work, cancels=_STARTING)

    async def stop_with_host(self, ref: str) -> resources.Operation:
        """In order, also one that is only being started, or still to be; what does not run is fine."""
        boot_id = self._host.boot_id
        with_host = functools.partial(msgspec.structs.replace, stopped_with_host=True, host_boot_id=boot_id)
        ahead = self._asked_of(self._store.find(ref).id)
        is_to_run = bool(ahead) and ahead[-1] in _STARTING  # though what comes first may be its end

        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            if vm.state is _RUNNING:
                progress.stage(resources.Stage.STOP, f"stopping {vm.name}, as its host goes down")
                self._notices.tell(vm.id, f"{vm.name} is being stopped: its host goes down")
                return self._view(await self.endings.stop(vm, functools.partial(_ORDERLY, mark=with_host)))
            is_stopped = vm.state is resources.VmState.STOPPED and not vm.stopped_with_host
            if (is_stopped and not is_to_run) or isinstance(vm, record.Salvaged):
                return self._view(vm)  # its user, or time, stopped it as we waited
            vm = with_host(vm)
            self._store.save(vm)
            return self._view(vm)

        return self._lifecycle_operation("vm.stop", ref, work, cancels=_STARTING)

    async def kill(self, ref: str) -> resources.Operation:
        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            progress.stage(resources.Stage.STOP, f"killing {vm.name}")
            self._notices.tell(vm.id, f"{vm.name} is being killed")
            return self._view(await self.endings.stop(vm, stop.kill))

        return self._lifecycle_operation("vm.kill", ref, work, cancels=_STARTING | {"vm.stop"})

    async def restart(self, ref: str) -> resources.Operation:
        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            vm.require_readable()
            before = vm.boot_id
            if vm.state is _RUNNING:
                progress.stage(resources.Stage.STOP, f"stopping {vm.name}")
                self._notices.tell(vm.id, f"{vm.name} is being restarted")
                vm = await self.endings.stop(vm, _ORDERLY)
            view = await self._start(vm, progress)
            if view.boot_id == before:
                raise errors.OperationFailedError(f"{vm.name} still has the boot id of before the restart")
            return view

        return self._lifecycle_operation("vm.restart", ref, work)

    async def delete(self, ref: str, *, unless_up: bool = False) -> resources.Operation:
        """With `unless_up` raises ConflictError for one that runs or is being started."""
        if unless_up and self.is_up(found := self._store.find(ref)):
            raise _is_up(found.name)

        async def work(progress: operations.Progress, vm: record.VmRecord) -> None:
            if unless_up and vm.state is _RUNNING:  # it was started as we waited
                raise _is_up(vm.name)
            progress.stage(resources.Stage.DELETE, f"deleting {vm.name}")
            self._notices.tell(vm.id, f"{vm.name} is being deleted")
            await self.endings.delete(vm)

        cancels = frozenset() if unless_up else _STARTING | {"vm.stop", "vm.kill"}
        return self._lifecycle_operation("vm.delete", ref, work, cancels=cancels)

    async def stop_when_due(self, vm: record.VmRecord, why: str, is_due: lifetimes.IsDue) -> None:
        """Time has stopped it, unless somebody came in between."""

        async def work(progress: operations.Progress, vm: record.VmRecord) -> resources.Vm:
            if vm.state is _RUNNING and is_due(vm):
                progress.stage(resources.Stage.STOP, f"stopping {vm.name}, which {why}")
                by_time = functools.partial(msgspec.structs.replace, stopped_because=why)
                vm = await self.endings.stop(vm, functools.partial(_ORDERLY, mark=by_time))
                _log.info("vm stopped by time", extra={"vm": vm.id, "why": why})
            return self._view(vm)

        operation = self._lifecycle_operation("vm.stop", vm.id, work)
        await self._operations.wait(operation.id)

    def is_up(self, vm: record.VmRecord) -> bool:
        """It runs, or is being started, or waits for that."""
        return vm.state is _RUNNING or not _STARTING.isdisjoint(self._asked_of(vm.id))

    async def close(self) -> None:
        """Stops watching; running VMs are left alone."""
        await self.lifetimes.close()
        await self.sessions.claims.close()
        await self.endings.close()

    # --- inside ---

    def _tell_of_silence(self, vm_id: names.VmId, is_silent: bool) -> None:
        with contextlib.suppress(errors.BangerError):  # a row that cannot be read must not end the asking
            name = self._store.get(vm_id).name
            told = (
                f"does not answer any more; see `banger vm explain {name}`" if is_silent else "answers again"
            )
            self._notices.tell(vm_id, f"{name} {told}")

    def _view(self, vm: record.VmRecord, *, with_timings: bool = False) -> resources.Vm:
        return self._views.vm(vm, self._seen(vm), with_timings=with_timings)

    def _seen(self, vm: record.VmRecord) -> views.Seen:
        used = self.activities.of(vm.id)
        silent_since = self.endings.live.agents.silent_since(vm.id)
        unserved = self._publisher.unserved(vm) if vm.state is _RUNNING else {}
        return views.Seen(
            pid=self.endings.live.pid(vm.id),
            silent_since=silent_since,
            idle_s=None if used.is_busy else used.idle_s,
            unpublished={str(each): why for each, why in unserved.items()},
        )

    def _lifecycle_operation(
        self, kind: str, ref: str, work: Work, *, cancels: frozenset[str] = frozenset()
    ) -> resources.Operation:
        """Runs `work` on the row as it is under the lock, after ending the operations it overrides."""
        found = self._store.find(ref)

        async def locked(progress: operations.Progress) -> resources.Vm | None:
            self._override(found.id, cancels)
            async with self._lifecycle.hold(found.id, progress.op_id):
                return await work(progress, self._store.get(found.id))

        return self._operations.start(kind, found.name, locked)

    def _asked_of(self, vm_id: names.VmId) -> tuple[str, ...]:
        """The kinds of operations at work on it and of those that wait, in their order."""
        return tuple(self._operations.get(each).kind for each in self._lifecycle.wanting(vm_id))

    def _override(self, vm_id: names.VmId, kinds: frozenset[str]) -> None:
        """Those that wait as well, or each would have its turn; the lock is free when all have ended."""
        for ahead in self._lifecycle.wanting(vm_id):
            if self._operations.get(ahead).kind in kinds:
                self._operations.request_cancel(ahead)

    async def _start(
        self, vm: record.VmRecord, progress: operations.Progress, *, remove_on_failure: bool = False
    ) -> resources.Vm:
        seen = timeline.Timeline(vm.id, progress.stage)
        pipeline = start.Start(self._host, vm, self._features, seen)
        try:
            with self._memory.claimed(vm):
                await steps.run(pipeline.steps(), seen)
        except BaseException as error:
            if isinstance(error, errors.BangerError):
                error.step = seen.failed_step
            # A cancellation that arrives meanwhile must not hide why the start failed.
            with contextlib.suppress(asyncio.CancelledError):
                await steps.finish(self._failed(vm, seen, error, progress.op_id, remove=remove_on_failure))
            raise
        assert pipeline.started is not None  # noqa: S101 - the pipeline sets it or raises
        started = timeline.kept(self._store, pipeline.started, seen)
        self.endings.live.add(vm.id, pipeline.vmm_pid)
        self.activities.of(vm.id).touch()
        _log.info("vm started", extra={"vm": vm.id, "boot_id": started.boot_id})
        return self._view(started, with_timings=True)

    async def _failed(
        self,
        vm: record.VmRecord,
        seen: timeline.Timeline,
        error: BaseException,
        op_id: str,
        *,
        remove: bool,
    ) -> None:
        """The row keeps why; what goes wrong in keeping it is noted on the error and hides nothing."""
        try:
            if remove:
                await self.endings.delete(vm)
                return
            # A start that was taken back, with the disks that it made, was none.
            row = msgspec.structs.replace(self._store.get(vm.id), started_at=vm.started_at)
            self._store.save(
                changes.failed(
                    row,
                    error,
                    op_id=op_id,
                    step=seen.failed_step,
                    timings=tuple(seen.timings),
                )
            )
        except Exception as second:
            error.add_note(f"keeping the error of {vm.name}: {second}")
        finally:
            if getattr(error, "__notes__", ()):  # an undo failed
                self.endings.leftovers.add(vm.id)


def _is_up(name: str) -> errors.ConflictError:
    return errors.ConflictError(f"{name} runs, or is being started", hint=f"see `banger vm show {name}`")
