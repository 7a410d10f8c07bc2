# SPDX-License-Identifier: MIT
"""Whose is what: everything of banger's on the host against the rows. What has no owner is taken away here.

The world is looked at first and the rows afterwards: a row is made before anything of its VM and deleted
after everything, so what was seen and has no row is nobody's, or gone by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from banger import artefacts, workers
from banger.contract import errors, names, privileged, resources
from banger.contract import inventory as contract
from banger.contract.inventory import Kind, Thing
from banger.owner import config, operations, store
from banger.vm import host as hosts
from banger.vm import record, stop

_log = logging.getLogger(__name__)

_BANGER: Final = "banger"
_OF_STATE: Final = frozenset({"vms", "images", "kernels", "ssh", "daemon.lock"})
_OF_CACHE: Final = frozenset({"blobs", "imports", "pinned", "recipes"})
_OURS: Final = (config.DATABASE, f".{config.DATABASE}.", *artefacts.SCRATCH)
"""How the other names there begin that are ours."""
_MAKING: Final = ("image.", "kernel.", "runtime.", "vm.create")


class Vms(Protocol):
    """The part of the VM service that knows who works on a VM."""

    def holder(self, vm_id: names.VmId, /) -> str | None: ...

    async def take_down(self, vm_id: names.VmId, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Places:
    """The owner's own directories."""

    state: Path
    cache: Path
    bridge: str = names.BRIDGE


class Inventory:
    """Looks anew at each call; nothing is remembered."""

    def __init__(
        self,
        host: hosts.Host,
        rows: store.Store,
        vms: Vms,
        running: operations.Operations,
        places: Places,
        names_of: Callable[[], dict[str, str]],
    ) -> None:
        self._host = host
        self._rows = rows
        self._vms = vms
        self._running = running
        self._places = places
        self._names_of = names_of

    async def take(self) -> contract.Inventory:
        """A leftover is what looks like one twice: beside a stop or a create, one look sees both sides."""
        found = await self._look()
        if not found.leftovers:
            return found
        seen = {(each.kind, each.name) for each in found.leftovers}
        again = (await self._look()).things
        return contract.Inventory(
            tuple(each for each in again if each.owner or each.foreign or (each.kind, each.name) in seen)
        )

    async def _look(self) -> contract.Inventory:
        world = await self._host.privileged(privileged.ListWorld())
        found, half_made = await asyncio.to_thread(self._judged, world)
        found += self._staged(half_made)
        return contract.Inventory(tuple(sorted(found, key=_order)))

    def begin_collecting(self) -> resources.Operation:
        """As an operation: a device that is busy is waited for."""

        async def work(progress: operations.Progress) -> None:
            progress.stage(resources.Stage.DELETE, "taking away what nobody owns")
            await self.collect()

        return self._running.start("host.collect", "this host", work)

    async def collect(self) -> None:
        """Takes away what has no owner; goes on after an error, and raises the first with all others."""
        left = (await self.take()).leftovers
        rows = {vm.id for vm in self._rows.list()}
        failed: list[errors.BangerError] = []
        for vm_id in sorted({thing.vm_id for thing in left if thing.vm_id}):
            _log.warning("taking away what nobody owns", extra={"vm": vm_id})
            try:
                if vm_id in rows:
                    await self._vms.take_down(names.VmId(vm_id))
                else:
                    await collect_vm(self._host, names.VmId(vm_id))
            except errors.BangerError as error:
                failed.append(error)
        paths = [Path(thing.name) for thing in left if not thing.vm_id and thing.kind in _OUR_FILES]
        await asyncio.to_thread(self._remove, paths)
        if failed:
            for other in failed[1:]:
                failed[0].add_note(other.message)
            raise failed[0]

    def sweep(self) -> None:
        """At the daemon's start, before anything is being made: whatever is half made is nobody's."""
        self._remove([*_half_made(self._places)])

    def _remove(self, paths: Collection[Path]) -> None:
        tops = (self._places.state, self._places.cache)
        for path in paths:
            if not any(top in path.parents for top in tops):
                continue
            _log.warning("deleting files that nobody owns", extra={"path": str(path)})
            if _is_directory(path):
                self._end_workers(path)
                shutil.rmtree(path, ignore_errors=True)
            else:  # a link is not followed
                with contextlib.suppress(OSError):
                    path.unlink()

    def _end_workers(self, path: Path) -> None:
        """Outside a unit, programs that a daemon had started outlive it, and would go on writing there."""
        try:
            ended = workers.end(path)
        except errors.DeadlineError as error:
            _log.error("programs that nobody owns", extra={"error": error.message})
        else:
            if ended:
                _log.warning("ended programs that nobody owns", extra={"path": str(path), "count": ended})

    def _judged(self, world: privileged.World) -> tuple[list[Thing], list[Path]]:
        """In a thread: it looks at files. What is half made is yet to be judged."""
        rows = self._rows.list()
        judge = _Judge({vm.id: vm for vm in rows}, {vm.slot: vm for vm in rows}, self._vms.holder)
        found = [thing for seen in world.vms for thing in judge.of_vm(seen, self._host.layout)]
        found += [judge.other(each) for each in world.others]
        if world.bridge:
            found.append(Thing(Kind.BRIDGE, self._places.bridge, "the network of all VMs", _BANGER))
        found += judge.leases(self._host.network)
        found += judge.disks(self._places.state / "vms")
        found += self._owners_files()
        found += _strangers(self._places)
        return found, [*_half_made(self._places)]

    def _staged(self, half_made: Collection[Path]) -> Iterator[Thing]:
        """The operations after the files: one that has begun since has made none of these."""
        at_work = [each for each in self._running.list() if _makes(each)]
        for path in half_made:
            if path.parent == self._places.state / "ssh":
                # A crash leaves none: they go as the daemon starts. A start makes keys, or who asks for ssh.
                yield Thing(Kind.STAGED, str(path), "keys are being made", _BANGER)
            elif at_work:
                yield Thing(Kind.STAGED, str(path), f"{at_work[0].kind} is at work", at_work[0].id)
            else:
                yield Thing(Kind.STAGED, str(path), "nothing is being made")

    def _owners_files(self) -> Iterator[Thing]:
        known = self._names_of()
        for kind in (Kind.IMAGE, Kind.KERNEL):
            for path in _entries(self._places.state / f"{kind}s"):
                name = known.get(path.name, "")
                if names.is_id(path.name) and _is_directory(path):
                    why = f"{kind} {name}" if name else f"its record cannot be read; `banger {kind} delete`"
                    yield Thing(kind, str(path), why, name or _BANGER)
                elif not artefacts.is_half_made(path.name):
                    yield Thing(kind, str(path), f"no {kind} is called so")


_OUR_FILES: Final = frozenset({Kind.DISKS, Kind.STAGED, Kind.IMAGE, Kind.KERNEL})


@dataclass(frozen=True, slots=True)
class _Judge:
    """Says whose a thing is."""

    rows: dict[names.VmId, record.VmRecord]
    slots: dict[int, record.VmRecord]
    holder: Callable[[names.VmId], str | None]

    def of_vm(self, seen: privileged.VmWorld, layout: hosts.Layout) -> Iterator[Thing]:
        vm_id = names.VmId(seen.vm_id)
        row = self.rows.get(vm_id)
        runtime = self._runtime(row, runs=seen.vmm_pid > 0)
        for kind, name in _runtime_names(seen, layout):
            yield Thing(kind, name, runtime[1], runtime[0], vm_id)
        if seen.logs:
            yield self._kept(Kind.LOGS, str(layout.logs / vm_id), vm_id)

    def other(self, each: privileged.Other) -> Thing:
        kind = Kind(each.kind)
        if kind is Kind.PROCESS:
            row = self.slots.get(each.slot)
            owner, why = self._runtime(row, runs=True)
            if row is None:
                why = f"no VM has slot {each.slot}; it ends by itself, or with `kill`"
            return Thing(kind, each.name, why, owner, row.id if row is not None else "")
        if kind is Kind.TAP:
            return Thing(kind, each.name, "made ahead for the next VM; it goes with bangerd-root", _BANGER)
        if kind is Kind.STAGED:
            return Thing(kind, each.name, "root's own; it goes when bangerd-root next starts", _BANGER)
        return Thing(kind, each.name, "named like ours and not made by us", vm_id=each.vm_id, foreign=True)

    def leases(self, network: ipaddress.IPv4Network) -> Iterator[Thing]:
        for vm in self.rows.values():
            yield Thing(Kind.UID, f"slot {vm.slot}", "leased to it", vm.name, vm.id)
            if vm.network:
                address = str(names.guest_address(network, vm.slot))
                yield Thing(Kind.ADDRESS, address, "leased to it", vm.name, vm.id)

    def disks(self, parent: Path) -> Iterator[Thing]:
        for path in _entries(parent):
            is_id = names.is_id(path.name)
            if is_id and (path.name in self.rows or _is_directory(path)):
                yield self._kept(Kind.DISKS, str(path), names.VmId(path.name))
            else:
                yield Thing(Kind.DISKS, str(path), "no VM has such an id")

    def _kept(self, kind: Kind, name: str, vm_id: names.VmId) -> Thing:
        row = self.rows.get(vm_id)
        if row is None:
            return Thing(kind, name, f"no VM has the id {vm_id}", vm_id=vm_id)
        return Thing(kind, name, f"kept while {row.name} exists", row.name, vm_id)

    def _runtime(self, row: record.VmRecord | None, *, runs: bool) -> tuple[str, str]:
        """The owner of what only a VM that runs has, and why."""
        if row is None:
            return "", "no VM has such an id"
        holder = self.holder(row.id)
        if holder is not None:
            return row.name, f"operation {holder} is at work" if holder else "an operation is at work"
        if row.state is resources.VmState.RUNNING:
            return (row.name, "it runs") if runs else ("", f"{row.name} has no VMM any more")
        return "", f"{row.name} is {row.state}"


def _runtime_names(seen: privileged.VmWorld, layout: hosts.Layout) -> Iterator[tuple[Kind, str]]:
    """Every name follows from the id."""
    vm_id = names.VmId(seen.vm_id)
    if seen.vmm_pid:
        yield Kind.VMM, f"pid {seen.vmm_pid}"
    if seen.snapshot:
        yield Kind.SNAPSHOT, names.dm_name(vm_id)
    if seen.loops:
        yield Kind.LOOP, f"{seen.loops} labelled {names.loop_label(vm_id, '')}"
    if seen.tap:
        yield Kind.TAP, names.tap_name(vm_id)
    if seen.rules:
        yield Kind.RULES, f"nftables elements of {vm_id}"
    if seen.cgroup:
        yield Kind.CGROUP, names.cgroup_path(vm_id)
    if seen.jail:
        yield Kind.JAIL, str(layout.jails / "firecracker" / vm_id)
        for path in (layout.api_socket(vm_id), layout.vsock_socket(vm_id)):
            if _is_there(path):
                yield Kind.SOCKET, str(path)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a jail that the owner may not look into yet
        return False


def _entries(parent: Path) -> list[Path]:
    """Whatever lies there, links and plain files too."""
    return sorted(parent.iterdir()) if parent.is_dir() else []


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _directories(parent: Path) -> list[Path]:
    return [path for path in _entries(parent) if _is_directory(path)]


def _strangers(places: Places) -> Iterator[Thing]:
    """Beside what is ours, and so perhaps somebody's: only shown."""
    for parent, known in ((places.state, _OF_STATE), (places.cache, _OF_CACHE)):
        for path in _entries(parent):
            if path.name not in known and not path.name.startswith(_OURS):
                yield Thing(Kind.FILE, str(path), "beside ours and not made by us", foreign=True)


def _half_made(places: Places) -> Iterator[Path]:
    """What whoever makes it removes, unless the daemon is killed meanwhile."""
    yield from places.state.glob(f".{config.DATABASE}.*")
    for kind in ("images", "kernels"):
        yield from artefacts.half_made(places.state / kind)
    for parent in (places.state / "ssh", places.cache, *_directories(places.cache)):
        yield from artefacts.scratch_left(parent)


def disks_of_nobody(layout: hosts.Layout, known: Collection[str]) -> list[Path]:
    """Directories of VMs that were deleted half way."""
    return [path for path in _directories(layout.state / "vms") if path.name not in known]


def _makes(operation: resources.Operation) -> bool:
    return not operation.status.is_final and operation.kind.startswith(_MAKING)


def _order(thing: Thing) -> tuple[bool, str, str, str]:
    return (bool(thing.owner) or thing.foreign, thing.owner, thing.kind, thing.name)


async def collect_vm(host: hosts.Host, vm_id: names.VmId) -> None:
    """Nothing is left of a VM without a row: neither runtime, nor logs, nor disks."""
    await host.privileged(privileged.TearDown(vm_id=vm_id))
    await host.privileged(privileged.PurgeLogs(vm_id=vm_id))
    directory = host.layout.vm_dir(vm_id)
    if directory.is_dir() and not directory.is_symlink():
        await stop.delete_disks(directory)
