# SPDX-License-Identifier: MIT
"""The closed table from request type to function, and how each one is run: one at a time for each VM.

Called by the server for the socket, and by banger.inprocess.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any, Final

import banger
from banger.contract import errors, privileged
from banger.helper import guest_rules, inventory, network, process, resolver, storage
from banger.helper import policy as policies

LOCK_DEADLINE_S: Final = 60.0
SETTLE_DEADLINE_S: Final = 10.0


def get_host(_policy: policies.Policy, _request: privileged.GetHost) -> privileged.HostInfo:
    return privileged.HostInfo(version=banger.__version__, protocol=privileged.PROTOCOL_VERSION)


def tear_down(policy: policies.Policy, request: privileged.TearDown) -> privileged.Done:
    """In the order of dependence; goes on after an error, and reports all."""
    vm_id = request.vm_id
    failed: list[Exception] = []
    parts: tuple[privileged.Request[Any], ...] = (
        privileged.KillVmm(vm_id=vm_id),
        privileged.DeleteTap(vm_id=vm_id),
        privileged.DeleteGuestRules(vm_id=vm_id),
        privileged.DeleteSnapshot(vm_id=vm_id),
        privileged.DetachWorkDisk(vm_id=vm_id),
        privileged.DeleteJail(vm_id=vm_id),
    )
    for part in parts:
        try:
            OPERATIONS[type(part)](policy, part)
        except (errors.BangerError, OSError) as error:
            failed.append(_explained(policy, part, error))
    if failed:
        for other in failed[1:]:
            failed[0].add_note(str(other))
        raise failed[0]
    return privileged.Done()


# Any: the table pairs each request type with the function that takes it, which a type cannot say.
OPERATIONS: Final[
    dict[type[privileged.Request[Any]], Callable[[policies.Policy, Any], privileged.Result]]
] = {
    privileged.GetHost: get_host,
    privileged.ListWorld: inventory.list_world,
    privileged.EnsureBridge: network.ensure_bridge,
    privileged.DeleteBridge: network.delete_bridge,
    privileged.RouteResolver: resolver.route_resolver,
    privileged.UnrouteResolver: resolver.unroute_resolver,
    privileged.CheckRuntime: process.check_runtime,
    privileged.CreateSnapshot: storage.create_snapshot,
    privileged.CheckSnapshot: storage.check_snapshot,
    privileged.PatchRoot: storage.patch_root,
    privileged.DeleteSnapshot: storage.delete_snapshot,
    privileged.AttachWorkDisk: storage.attach_work_disk,
    privileged.DetachWorkDisk: storage.detach_work_disk,
    privileged.CreateTap: network.create_tap,
    privileged.DeleteTap: network.delete_tap,
    privileged.SetGuestRules: guest_rules.set_guest_rules,
    privileged.DeleteGuestRules: guest_rules.delete_guest_rules,
    privileged.AllowAddresses: guest_rules.allow_addresses,
    privileged.PrepareJail: process.prepare_jail,
    privileged.DeleteJail: process.delete_jail,
    privileged.LaunchVmm: process.launch,
    privileged.GrantApiSocket: process.grant_api_socket,
    privileged.GrantVsock: process.grant_vsock,
    privileged.FindVmm: process.find_vmm,
    privileged.KillVmm: process.kill_vmm,
    privileged.TearDown: tear_down,
    privileged.PurgeLogs: process.purge_logs,
}
LOOKS: Final = (privileged.FindVmm, privileged.ListWorld, privileged.GetHost)
"""They change nothing, and no other operation waits for them."""


def execute(policy: policies.Policy, request: privileged.Request[privileged.ResultT]) -> privileged.ResultT:
    """`run`, for callers that know what they ask."""
    return run(policy, request)  # type: ignore[no-any-return]


def run(policy: policies.Policy, request: privileged.Request[Any]) -> Any:
    """Runs one operation; whatever the kernel refuses becomes a BangerError that names it."""
    if isinstance(request, privileged.ListWorld) and request.settled:
        _settle()
    with _known(), _alone(request):
        try:
            return OPERATIONS[type(request)](policy, request)
        except OSError as error:
            raise _explained(policy, request, error) from error


_under_way: Final[set[object]] = set()
_changed: Final = threading.Condition()


@contextlib.contextmanager
def _known() -> Generator[None]:
    """The operation is under way, for who has to know when it is over."""
    token = object()
    with _changed:
        _under_way.add(token)
    try:
        yield
    finally:
        with _changed:
            _under_way.discard(token)
            _changed.notify_all()


def _settle() -> None:
    """Until all that are under way now have ended. One that takes longer is in nobody's way."""
    with _changed:
        now = set(_under_way)
        _changed.wait_for(lambda: not now & _under_way, SETTLE_DEADLINE_S)


_locks: Final[weakref.WeakValueDictionary[str, threading.Lock]] = weakref.WeakValueDictionary()
_locks_guard: Final = threading.Lock()


@contextlib.contextmanager
def _alone(request: privileged.Request[Any]) -> Generator[None]:
    """Two operations on one VM, or two on the bridge, wait for each other; a lock lives while it is used."""
    if isinstance(request, LOOKS):
        yield
        return
    with _locks_guard:
        lock = _locks.setdefault(getattr(request, "vm_id", ""), threading.Lock())
    if not lock.acquire(timeout=LOCK_DEADLINE_S):
        raise errors.ConflictError("another operation on the same VM takes too long")
    try:
        yield
    finally:
        lock.release()


def _explained(
    policy: policies.Policy, request: privileged.Request[Any], error: errors.BangerError | OSError
) -> errors.BangerError:
    if isinstance(error, errors.BangerError):
        return error
    what = f": {error.filename}" if error.filename else ""
    message = f"{operation_name(request)}{what}: {os.strerror(error.errno) if error.errno else error}"
    message = message.encode(errors="replace").decode()  # a VMM gives its files whatever names it likes
    if (known := errors.exhausted(error)) is not None:
        # What is written by descriptor has no path, and all of it lies there.
        where = f", in {policy.helper_dir}" if error.errno == errno.ENOSPC and "/" not in what else ""
        return type(known)(f"{message}{where}", hint=known.hint)
    if error.errno == errno.ENOENT and str(error.filename).startswith("/dev/"):
        hint = "load the kernel modules loop, dm_snapshot, tun and kvm"
        return errors.MissingToolError(message, hint=hint)
    if error.errno == errno.EBUSY:
        return errors.ConflictError(message)
    return errors.OperationFailedError(message)


def operation_name(request: privileged.Request[Any]) -> str:
    return str(request.__struct_config__.tag)
