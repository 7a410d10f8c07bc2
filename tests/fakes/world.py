# SPDX-License-Identifier: MIT
"""A host that exists only in memory: what privileged operations would have made, and in what order.

Meets `PrivilegedOps`, also over a socket (tests/fakes/helper.py). Its VMMs (tests/fakes/vmm.py) listen on
real sockets at the contract's paths. It refuses what the real helper refuses, with the same codes: both run
the cases of tests/contract/privileged_cases.py. `leftovers` counts what a test forgot.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from banger.contract import egress, errors, privileged
from tests.fakes import vmm

Hook = Callable[[privileged.Request[Any]], Awaitable[None]]


@dataclass(slots=True)
class VmState:
    """What exists of one VM."""

    snapshot: bool = False
    base_loops: bool = False
    """The loop devices below a snapshot, which are made first and go last."""
    work_disk: bool = False
    tap: bool = False
    tap_slot: int = 0
    rules: privileged.SetGuestRules | None = None
    names: dict[str, int] = field(default_factory=dict)
    """Addresses that were allowed for a time, and for how long."""
    jail: bool = False
    jail_slot: int = 0
    cgroup: bool = False
    logs: bool = False
    vmm: vmm.FakeVmm | None = None

    @property
    def runs(self) -> bool:
        return self.vmm is not None and self.vmm.is_running

    @property
    def is_empty(self) -> bool:
        kept = (
            self.snapshot,
            self.base_loops,
            self.work_disk,
            self.tap,
            self.rules,
            self.jail,
            self.cgroup,
            self.runs,
        )
        return not any(kept)


async def _nothing(_: privileged.Request[Any]) -> None:
    return


@dataclass(slots=True)
class World:
    """The helper and its host in one. `before` and `after` let a test fail, hang or count any operation."""

    state: Path
    jails: Path
    logs: Path
    behaviour: vmm.Behaviour = field(default_factory=vmm.Behaviour)
    before: Hook = _nothing
    after: Hook = _nothing
    middle: Hook = _nothing
    """Called between the parts of an operation that has some."""
    bridge: bool = False
    tables: bool = False
    """Packet rules are loaded; a test may flush them."""
    resolver: str = ""
    """Why this host cannot be told where names are."""
    routed: bool = False
    vms: dict[str, VmState] = field(default_factory=dict)
    settle_s: float = 30.0
    """For how long who wants a settled world waits for what is under way."""
    under_way: list[asyncio.Event] = field(default_factory=list)
    requests: list[privileged.Request[Any]] = field(default_factory=list)

    async def call(self, request: privileged.Request[privileged.ResultT], /) -> privileged.ResultT:
        self.requests.append(request)
        ended = asyncio.Event()
        under_way = list(self.under_way)
        self.under_way.append(ended)
        try:
            await self.before(request)
            if isinstance(request, privileged.ListWorld) and request.settled:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.settle_s):
                        for each in under_way:
                            await each.wait()
            result = await HANDLERS[type(request)](self, request)
            await self.after(request)
        finally:
            self.under_way.remove(ended)
            ended.set()
        return cast("privileged.ResultT", result)

    def vm(self, vm_id: str) -> VmState:
        return self.vms.setdefault(vm_id, VmState())

    def claim(self, vm_id: str, slot: int) -> VmState:
        """The VM, unless its slot and another jail's do not agree."""
        for other, vm in self.vms.items():
            if vm.jail and (vm.jail_slot == slot) != (other == vm_id):
                raise errors.ConflictError(f"slot {slot}: VM {other} has slot {vm.jail_slot}")
        return self.vm(vm_id)

    def leftovers(self) -> dict[str, VmState]:
        """VMs of which something besides logs exists."""
        return {vm_id: vm for vm_id, vm in self.vms.items() if not vm.is_empty}

    def asked(self, kind: type[privileged.Request[Any]]) -> int:
        return sum(isinstance(request, kind) for request in self.requests)

    async def lose_power(self) -> None:
        """What lies on the disk is left: jails' files and logs."""
        await self.close()
        self.bridge = self.tables = self.routed = False
        for vm_id, vm in list(self.vms.items()):
            self.vms[vm_id] = VmState(jail=vm.jail, jail_slot=vm.jail_slot, logs=vm.logs)

    async def close(self) -> None:
        for vm in self.vms.values():
            if vm.vmm is not None:
                await vm.vmm.kill()


def _need(condition: bool, message: str, error: type[errors.BangerError] = errors.ConflictError) -> None:
    if not condition:
        raise error(message)


def _need_file(path: Path) -> None:
    """A file of the owner's with something in it."""
    _need(path.is_file(), f"{path} does not exist", errors.NotFoundError)
    _need(path.stat().st_size > 0, f"{path} is not a plain file of the owner's", errors.UnauthorizedError)


async def _get_host(world: World, request: Any) -> privileged.Result:
    return privileged.HostInfo(version="fake", protocol=privileged.PROTOCOL_VERSION)


async def _list_world(world: World, request: Any) -> privileged.Result:
    return privileged.World(
        vms=tuple(
            privileged.VmWorld(
                vm_id=vm_id,
                snapshot=vm.snapshot,
                loops=int(vm.work_disk) + 2 * int(vm.base_loops),
                tap=vm.tap,
                rules=vm.rules is not None,
                jail=vm.jail,
                cgroup=vm.cgroup,
                logs=vm.logs,
                vmm_pid=_vmm(vm).pid,
            )
            for vm_id, vm in world.vms.items()
            if vm.logs or not vm.is_empty
        ),
        bridge=world.bridge,
    )


async def _ensure_bridge(world: World, request: Any) -> privileged.Result:
    rebuilt = not world.tables
    if rebuilt:
        for vm in world.vms.values():
            vm.rules = None
    world.bridge = world.tables = True
    return privileged.Ensured(rebuilt, tuple(sorted(vm_id for vm_id, vm in world.vms.items() if vm.rules)))


async def _delete_bridge(world: World, request: Any) -> privileged.Result:
    _need(not any(vm.tap for vm in world.vms.values()), "a tap is attached to the bridge")
    world.bridge = world.tables = world.routed = False
    return privileged.Done()


async def _route_resolver(world: World, request: Any) -> privileged.Result:
    _need(world.bridge, "the bridge does not exist", errors.NotFoundError)
    world.routed = not world.resolver
    return privileged.Routed(problem=world.resolver)


async def _unroute_resolver(world: World, request: Any) -> privileged.Result:
    world.routed = False
    return privileged.Done()


async def _create_snapshot(world: World, request: privileged.CreateSnapshot) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(not vm.snapshot, "the snapshot exists already")
    _need_file(world.state / "images" / request.image_id / "rootfs.ext4")
    _need_file(world.state / "vms" / request.vm_id / "overlay.cow")
    vm.base_loops = True
    await world.middle(request)
    vm.snapshot = True
    return privileged.Done()


async def _check_snapshot(world: World, request: privileged.CheckSnapshot) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(vm.snapshot, "there is no snapshot to check", errors.NotFoundError)
    return privileged.Done()


async def _patch_root(world: World, request: privileged.PatchRoot) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(vm.snapshot, "there is no snapshot to patch", errors.NotFoundError)
    return privileged.Done()


async def _delete_snapshot(world: World, request: privileged.DeleteSnapshot) -> privileged.Result:
    vm = world.vm(request.vm_id)
    _need(not (vm.snapshot and vm.runs), "the snapshot is in use")
    vm.snapshot = False
    await world.middle(request)
    vm.base_loops = False
    return privileged.Done()


async def _attach_work_disk(world: World, request: privileged.AttachWorkDisk) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(not vm.work_disk, "the work disk is attached already")
    _need_file(world.state / "vms" / request.vm_id / "work.ext4")
    vm.work_disk = True
    await world.middle(request)
    return privileged.Done()


async def _detach_work_disk(world: World, request: privileged.DetachWorkDisk) -> privileged.Result:
    vm = world.vm(request.vm_id)
    _need(not (vm.work_disk and vm.runs), "the work disk is in use")
    vm.work_disk = False
    return privileged.Done()


async def _create_tap(world: World, request: privileged.CreateTap) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(world.bridge, "there is no bridge", errors.NotFoundError)
    vm.tap, vm.tap_slot = True, request.slot
    await world.middle(request)
    return privileged.Done()


async def _delete_tap(world: World, request: privileged.DeleteTap) -> privileged.Result:
    world.vm(request.vm_id).tap = False
    return privileged.Done()


async def _set_guest_rules(world: World, request: privileged.SetGuestRules) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(world.tables, "the packet rules are not loaded", errors.NotFoundError)
    for rule in request.allow:
        try:
            ipaddress.ip_network(rule.cidr)
        except ValueError as error:
            raise errors.BadRequestError(str(error)) from None
    for other in world.vms.values():
        if other is not vm and other.rules is not None and other.rules.slot == request.slot:
            other.rules = None
    vm.rules = request
    return privileged.Done()


async def _delete_guest_rules(world: World, request: privileged.DeleteGuestRules) -> privileged.Result:
    vm = world.vm(request.vm_id)
    vm.rules = None
    vm.names.clear()
    return privileged.Done()


async def _allow_addresses(world: World, request: privileged.AllowAddresses) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    if vm.rules is None or not vm.rules.nat:
        raise errors.ConflictError("the VM has no NAT")
    for text in request.addresses:
        address = ipaddress.ip_address(text)
        _need(egress.is_nameable(address), f"a name may not stand for {text}", errors.BadRequestError)
        _need(address.version == 4 or vm.rules.ipv6, "the VM has no IPv6")
    vm.names |= dict.fromkeys(request.addresses, request.ttl_s)
    return privileged.Done()


async def _prepare_jail(world: World, request: privileged.PrepareJail) -> privileged.Result:
    _need(not world.vm(request.vm_id).runs, "the VMM still runs")
    vm = world.claim(request.vm_id, request.slot)
    socket = Path(privileged.api_socket(str(world.jails), request.vm_id))
    socket.parent.mkdir(parents=True, exist_ok=True)
    (world.logs / request.vm_id).mkdir(parents=True, exist_ok=True)
    vm.jail = True
    vm.jail_slot = request.slot
    await world.middle(request)
    vm.logs = True
    return privileged.Done()


async def _delete_jail(world: World, request: privileged.DeleteJail) -> privileged.Result:
    vm = world.vm(request.vm_id)
    _need(not vm.runs, "the VMM still runs")
    vm.cgroup = False
    await world.middle(request)
    vm.jail = False
    return privileged.Done()


async def _check_runtime(world: World, request: Any) -> privileged.Result:
    return privileged.Done()


async def _launch(world: World, request: privileged.LaunchVmm) -> privileged.Result:
    missing = errors.NotFoundError
    _need(world.vm(request.vm_id).jail, "there is no jail", missing)
    _need(not world.vm(request.vm_id).runs, "a VMM runs already")
    vm = world.claim(request.vm_id, request.slot)
    _need(vm.snapshot, "there is no root disk", missing)
    _need(vm.work_disk or not request.work_disk, "the work disk is not attached", missing)
    _need((vm.tap and vm.tap_slot == request.slot) or not request.tap, "there is no tap", missing)
    _need_file(world.state / "kernels" / request.kernel_id / "vmlinux")
    if request.initrd:
        _need_file(world.state / "kernels" / request.kernel_id / "initrd")
    vm.cgroup = True
    await world.middle(request)
    vm.vmm = vmm.FakeVmm(
        Path(privileged.api_socket(str(world.jails), request.vm_id)),
        Path(privileged.vsock_socket(str(world.jails), request.vm_id)),
        world.logs / request.vm_id / "console.log",
        world.behaviour,
    )
    await vm.vmm.start()
    return _vmm(vm)


def _vmm(vm: VmState) -> privileged.Vmm:
    return privileged.Vmm(pid=vm.vmm.pid if vm.vmm and vm.runs else 0)


async def _grant(world: World, request: privileged.GrantApiSocket) -> privileged.Result:
    vm = world.claim(request.vm_id, request.slot)
    _need(vm.runs, "there is no VMM", errors.NotRunningError)
    return privileged.Done()


async def _find_vmm(world: World, request: privileged.FindVmm) -> privileged.Result:
    return _vmm(world.vm(request.vm_id))


async def _kill_vmm(world: World, request: privileged.KillVmm) -> privileged.Result:
    vm = world.vm(request.vm_id)
    if vm.vmm is not None:
        await vm.vmm.kill()
    return privileged.Done()


async def _tear_down(world: World, request: privileged.TearDown) -> privileged.Result:
    """In the real one's order, and as it can be cut off between the parts."""
    vm = world.vm(request.vm_id)
    if vm.vmm is not None:
        await vm.vmm.kill()
    await world.middle(request)
    vm.tap, vm.rules = False, None
    await world.middle(request)
    vm.snapshot = vm.base_loops = vm.work_disk = False
    await world.middle(request)
    world.vms[request.vm_id] = VmState(logs=vm.logs)
    return privileged.Done()


async def _purge_logs(world: World, request: privileged.PurgeLogs) -> privileged.Result:
    world.vm(request.vm_id).logs = False
    return privileged.Done()


HANDLERS: dict[type[privileged.Request[Any]], Callable[[World, Any], Awaitable[privileged.Result]]] = {
    privileged.GetHost: _get_host,
    privileged.ListWorld: _list_world,
    privileged.EnsureBridge: _ensure_bridge,
    privileged.DeleteBridge: _delete_bridge,
    privileged.RouteResolver: _route_resolver,
    privileged.UnrouteResolver: _unroute_resolver,
    privileged.CheckRuntime: _check_runtime,
    privileged.CreateSnapshot: _create_snapshot,
    privileged.CheckSnapshot: _check_snapshot,
    privileged.PatchRoot: _patch_root,
    privileged.DeleteSnapshot: _delete_snapshot,
    privileged.AttachWorkDisk: _attach_work_disk,
    privileged.DetachWorkDisk: _detach_work_disk,
    privileged.CreateTap: _create_tap,
    privileged.DeleteTap: _delete_tap,
    privileged.SetGuestRules: _set_guest_rules,
    privileged.DeleteGuestRules: _delete_guest_rules,
    privileged.AllowAddresses: _allow_addresses,
    privileged.PrepareJail: _prepare_jail,
    privileged.DeleteJail: _delete_jail,
    privileged.LaunchVmm: _launch,
    privileged.GrantApiSocket: _grant,
    privileged.GrantVsock: _grant,
    privileged.FindVmm: _find_vmm,
    privileged.KillVmm: _kill_vmm,
    privileged.TearDown: _tear_down,
    privileged.PurgeLogs: _purge_logs,
}


async def hang(_: privileged.Request[Any]) -> None:
    """A hook that never comes back."""
    await asyncio.Event().wait()
