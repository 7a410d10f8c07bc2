# SPDX-License-Identifier: MIT
"""Privileged operations on block devices: loop devices, dm-snapshots, and the ext4 on them."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Generator
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import ext4, filesystem
from banger.helper import policy as policies
from banger.helper.linux import devmapper, libc, loop

CHUNK_SECTORS: Final = 8
_HEADER: Final = struct.Struct("<4sIII")
"""An overlay's, once used (drivers/md/dm-snap-persistent.c): magic, valid, version, sectors of a chunk."""
BUSY_DEADLINE_S: Final = 10.0
BASE, OVERLAY, WORK = "base", "overlay", "work"
_DONE: Final = privileged.Done()


def create_snapshot(policy: policies.Policy, request: privileged.CreateSnapshot) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    name = names.dm_name(vm_id)
    if devmapper.find(name) is not None:
        raise errors.ConflictError(f"device {name} exists already", hint="tear the VM down first", vm=vm_id)
    with (
        _attached(policy, f"images/{request.image_id}/rootfs.ext4", vm_id, BASE) as base,
        _attached(policy, f"vms/{vm_id}/overlay.cow", vm_id, OVERLAY) as store,
    ):
        _require_our_chunks(store, vm_id)
        sectors = os.lseek(base, 0, os.SEEK_END) // 512
        parameters = f"{_numbers(base)} {_numbers(store)} P {CHUNK_SECTORS}"
        # The loops then live as long as the device does.
        devmapper.create(name, _uuid(vm_id), sectors=sectors, target="snapshot", parameters=parameters)
    try:
        _require_valid(vm_id)
        # The owner may have written a header since it was read.
        if devmapper.parameters(name).split()[2:4] != ["P", str(CHUNK_SECTORS)]:
            raise _wrong_chunks(vm_id)
    except BaseException:
        devmapper.remove(name, deadline=time.monotonic() + BUSY_DEADLINE_S)
        raise
    return _DONE


def delete_snapshot(_policy: policies.Policy, request: privileged.DeleteSnapshot) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    deadline = time.monotonic() + BUSY_DEADLINE_S
    device = devmapper.find(names.dm_name(vm_id))
    if device is not None and device.uuid != _uuid(vm_id):
        raise errors.ConflictError(f"device {names.dm_name(vm_id)} is not banger's", vm=vm_id)
    freed = device is None or devmapper.remove(names.dm_name(vm_id), deadline=deadline)
    for role in (BASE, OVERLAY) if freed else ():
        freed = loop.detach(names.loop_label(vm_id, role), deadline=deadline) and freed
    if not freed:
        raise errors.ConflictError(
            f"the snapshot of VM {vm_id} is in use", hint="find its user with lsof", vm=vm_id
        )
    return _DONE


def check_snapshot(policy: policies.Policy, request: privileged.CheckSnapshot) -> privileged.Done:
    uid = filesystem.claim(policy, request.vm_id, request.slot)
    ext4.check(policy, snapshot_device(names.VmId(request.vm_id)), uid)
    return _DONE


def attach_work_disk(policy: policies.Policy, request: privileged.AttachWorkDisk) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    uid = filesystem.claim(policy, vm_id, request.slot)
    label = names.loop_label(vm_id, WORK)
    if loop.scan(label):
        raise errors.ConflictError(f"the work disk of VM {vm_id} is attached already", vm=vm_id)
    try:
        with _attached(policy, f"vms/{vm_id}/work.ext4", vm_id, WORK) as disk:
            device = os.fstat(disk).st_rdev
            ext4.check(policy, device, uid)
            ext4.grow(policy, device, uid)
    except BaseException:
        loop.detach(label, deadline=time.monotonic())
        raise
    return _DONE


def detach_work_disk(_policy: policies.Policy, request: privileged.DetachWorkDisk) -> privileged.Done:
    label = names.loop_label(names.VmId(request.vm_id), WORK)
    if not loop.detach(label, deadline=time.monotonic() + BUSY_DEADLINE_S):
        raise errors.ConflictError(f"the work disk of VM {request.vm_id} is in use", vm=request.vm_id)
    return _DONE


def snapshot_device(vm_id: names.VmId) -> int:
    """The number of the VM's snapshot device."""
    device = devmapper.find(names.dm_name(vm_id))
    if device is None or device.uuid != _uuid(vm_id):
        raise errors.NotFoundError(f"VM {vm_id} has no snapshot", vm=vm_id)
    return device.number


def work_device(vm_id: names.VmId) -> int:
    """The number of the loop device over the VM's work disk."""
    loops = loop.scan(names.loop_label(vm_id, WORK))
    if not loops:
        raise errors.NotFoundError(f"the work disk of VM {vm_id} is not attached", vm=vm_id)
    return os.stat(loops[0].path).st_rdev


def patch_root(policy: policies.Policy, request: privileged.PatchRoot) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    uid = filesystem.claim(policy, vm_id, request.slot)
    ext4.patch(policy, request, snapshot_device(vm_id), uid)
    _require_valid(vm_id)
    return _DONE


# --- devices ---


@contextlib.contextmanager
def _attached(policy: policies.Policy, path: str, vm_id: names.VmId, role: str) -> Generator[int]:
    """A loop device over a file of the owner's. One of a snapshot lives as long as somebody has it open."""
    writable = role != BASE
    flags = 0 if role == WORK else loop.LO_FLAGS_AUTOCLEAR
    flags |= 0 if writable else loop.LO_FLAGS_READ_ONLY
    opened = filesystem.open_owned(policy, path, writable=writable, max_bytes=filesystem.MAX_DISK_BYTES)
    with libc.closing(opened) as backing:
        made = loop.attach(backing, names.loop_label(vm_id, role), flags=flags)
    with libc.closing(made) as device:
        yield device


def _require_valid(vm_id: names.VmId) -> None:
    said = devmapper.status(names.dm_name(vm_id))
    if not said[:1].isdigit():
        hint = "the overlay is full or damaged; delete the VM, or free space on the host"
        raise errors.OperationFailedError(f"the snapshot of VM {vm_id} is unusable: {said}", hint=hint)


def _require_our_chunks(store: int, vm_id: names.VmId) -> None:
    """The kernel believes the header, not the table, and takes three chunks of memory: up to 6 GiB."""
    magic, _, _, sectors = _HEADER.unpack(os.pread(store, _HEADER.size, 0).ljust(_HEADER.size, b"\0"))
    if magic == b"SnAp" and sectors != CHUNK_SECTORS:
        raise _wrong_chunks(vm_id)


def _wrong_chunks(vm_id: names.VmId) -> errors.OperationFailedError:
    hint = f"delete the VM: nothing of banger's writes other chunks than of {CHUNK_SECTORS} sectors"
    return errors.OperationFailedError(f"the overlay of VM {vm_id} is damaged", hint=hint, vm=vm_id)


def _numbers(fd: int) -> str:
    device = os.fstat(fd).st_rdev
    return f"{os.major(device)}:{os.minor(device)}"


def _uuid(vm_id: names.VmId) -> str:
    return f"BANGER-{vm_id}"
