# SPDX-License-Identifier: MIT
"""Privileged operations on block devices: loops, dm-snapshots, and edits of the ext4 on a snapshot."""

from __future__ import annotations

import os
import struct
import time
from typing import Final

from banger.contract import errors, names, privileged
from banger.helper import filesystem, program
from banger.helper import policy as policies
from banger.helper.linux import devmapper, loop

CHUNK_SECTORS: Final = 8
BUSY_DEADLINE_S: Final = 10.0
CHECK_DEADLINE_S: Final = 120.0
PATCH_DEADLINE_S: Final = 30.0
BASE, OVERLAY, WORK = "base", "overlay", "work"
_EXT2_SUPER_MAGIC: Final = 0xEF53
_EXT2_VALID_FS: Final = 1
_INCOMPAT_RECOVER: Final = 0x4
_RO_COMPAT_ORPHAN_PRESENT: Final = 0x10000
_DONE: Final = privileged.Done()


def create_snapshot(policy: policies.Policy, request: privileged.CreateSnapshot) -> privileged.Snapshot:
    vm_id = names.VmId(request.vm_id)
    filesystem.claim(policy, vm_id, request.slot)
    name = names.dm_name(vm_id)
    if devmapper.find(name) is not None:
        raise errors.ConflictError(f"device {name} exists already", hint="tear the VM down first", vm=vm_id)
    held: list[int] = []
    try:
        base = _attach(policy, f"images/{request.image_id}/rootfs.ext4", vm_id, BASE, held)
        store = _attach(policy, f"vms/{vm_id}/overlay.cow", vm_id, OVERLAY, held)
        size = os.lseek(held[0], 0, os.SEEK_END)
        parameters = f"{_numbers(base)} {_numbers(store)} P {CHUNK_SECTORS}"
        device = devmapper.create(
            name, _uuid(vm_id), sectors=size // 512, target="snapshot", parameters=parameters
        )
    finally:
        for fd in held:  # the loops now live as long as the device does
            os.close(fd)
    try:
        _require_valid(vm_id)
    except BaseException:
        devmapper.remove(name, deadline=time.monotonic() + BUSY_DEADLINE_S)
        raise
    return privileged.Snapshot(device=f"/dev/dm-{os.minor(device.number)}")


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


def check_snapshot(policy: policies.Policy, request: privileged.CheckSnapshot) -> privileged.Check:
    uid = filesystem.claim(policy, request.vm_id, request.slot)
    return _check(policy, snapshot_device(names.VmId(request.vm_id)), uid)


def attach_work_disk(policy: policies.Policy, request: privileged.AttachWorkDisk) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    uid = filesystem.claim(policy, vm_id, request.slot)
    label = names.loop_label(vm_id, WORK)
    if loop.scan(label):
        raise errors.ConflictError(f"the work disk of VM {vm_id} is attached already", vm=vm_id)
    held: list[int] = []
    try:
        _attach(policy, f"vms/{vm_id}/work.ext4", vm_id, WORK, held)
        _check(policy, os.fstat(held[0]).st_rdev, uid)
    except BaseException:
        loop.detach(label, deadline=time.monotonic())
        raise
    finally:
        for fd in held:
            os.close(fd)
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


# --- ext4 on the snapshot ---


def patch_root(policy: policies.Policy, request: privileged.PatchRoot) -> privileged.Done:
    vm_id = names.VmId(request.vm_id)
    uid = filesystem.claim(policy, vm_id, request.slot)
    patch_ext4(policy, request, snapshot_device(vm_id), uid)
    _require_valid(vm_id)
    return _DONE


def patch_ext4(policy: policies.Policy, request: privileged.PatchRoot, device: int, uid: int) -> None:
    """One run of debugfs writes each file and reads it back; it exits 0 always, so only that counts."""
    files = {
        "/etc/hostname": (0o644, f"{request.hostname}\n".encode()),
        f"{names.GUEST_DIR}/config": (0o644, _guest_config(request)),
    }
    if request.inject_guest:
        with open(policies.open_root_owned(policy.guest), "rb") as binary:
            files[names.GUEST_BINARY] = (0o755, binary.read())
    held = [filesystem.open_node(policy, device, uid)]
    try:
        lines = [f"mkdir {names.GUEST_DIR}", "mkdir /etc"]
        for path, (mode, data) in files.items():
            held.append(_memory(data))
            lines += _write_commands(path, mode, held[-1])
        script = _memory("\n".join([*lines, ""]).encode())
        held.append(script)
        arguments = ["-w", "-f", f"/proc/self/fd/{script}", f"/proc/self/fd/{held[0]}"]
        ended = program.run("debugfs", arguments, uid=uid, fds=held, deadline_s=PATCH_DEADLINE_S)
    finally:
        for fd in held:
            os.close(fd)
    for path, (_, data) in files.items():
        if ended.status != 0 or _echo(path) + data not in ended.output:
            said = _complaint(ended.output)
            raise errors.OperationFailedError(f"could not write {path} into the root disk: {said}")
    _flush(policy, device)


def _write_commands(path: str, mode: int, source: int) -> list[str]:
    directory, name = path.rsplit("/", 1)
    return [
        f"cd {directory}",
        f"rm {name}",
        f"write /proc/self/fd/{source} {name}",
        f"sif {name} mode 0{0o100000 | mode:o}",
        f"sif {name} uid 0",
        f"sif {name} gid 0",
        f"cat {name}",
    ]


def _echo(path: str) -> bytes:
    """What debugfs prints before the content of a file."""
    return f"debugfs: cat {os.path.basename(path)}\n".encode()


def _guest_config(request: privileged.PatchRoot) -> bytes:
    lines = [f"hostname={request.hostname}"]
    if request.ip_arg:
        lines.append(f"ip={request.ip_arg}")
    lines += [f"dns={address}" for address in request.dns]
    if request.work_disk:
        lines.append("mount=/dev/vdb:/root:ext4")
    return "".join(f"{line}\n" for line in lines).encode()


def _complaint(output: bytes) -> str:
    """The last thing a tool said that is not an echo of our commands, nor of a file that was not there."""
    lines = output[-4096:].decode(errors="replace").splitlines()
    said = [line for line in lines if not line.startswith("debugfs") and "not found" not in line]
    return said[-1][:200] if said else "it said nothing"


def _memory(data: bytes) -> int:
    """An anonymous file of root's with this content, of mode 0777: the VM's uid may open it by number."""
    fd = os.memfd_create("banger")
    os.write(fd, data)
    return fd


def _flush(policy: policies.Policy, device: int) -> None:
    """What debugfs wrote has reached the overlay, or we hear of it now."""
    node = filesystem.open_node(policy, device, 0)
    try:
        fd = os.open(f"/proc/self/fd/{node}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(node)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check(policy: policies.Policy, device: int, uid: int) -> privileged.Check:
    """e2fsck as the VM's uid: it parses what the owner or the guest made."""
    node = filesystem.open_node(policy, device, uid)
    try:
        if _is_clean(node):
            return privileged.Check(repaired=False)
        deadline = time.monotonic() + CHECK_DEADLINE_S
        for mode in ("-p", "-y"):
            left_s = max(1.0, deadline - time.monotonic())
            ended = program.run(
                "e2fsck", [mode, f"/proc/self/fd/{node}"], uid=uid, fds=[node], deadline_s=left_s
            )
            if ended.status in {0, 1}:
                return privileged.Check(repaired=ended.status == 1)
    finally:
        os.close(node)
    said = _complaint(ended.output)
    raise errors.OperationFailedError(
        f"e2fsck could not repair the file system (status {ended.status}): {said}"
    )


def _is_clean(node: int) -> bool:
    """What makes `e2fsck -p` end at once (struct ext2_super_block); starting it to hear that is not free."""
    fd = os.open(f"/proc/self/fd/{node}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        block = os.pread(fd, 1024, 1024)
    finally:
        os.close(fd)
    if len(block) < 1024:
        return False
    magic, state = struct.unpack_from("<HH", block, 0x38)
    incompatible, read_only = struct.unpack_from("<II", block, 0x60)
    (last_orphan,) = struct.unpack_from("<I", block, 0xE8)
    pending = incompatible & _INCOMPAT_RECOVER or read_only & _RO_COMPAT_ORPHAN_PRESENT or last_orphan
    return magic == _EXT2_SUPER_MAGIC and state == _EXT2_VALID_FS and not pending


# --- devices ---


def _attach(policy: policies.Policy, path: str, vm_id: names.VmId, role: str, held: list[int]) -> int:
    """Attaches a file of the owner's; the new descriptor joins `held`, the device's number is returned."""
    writable = role != BASE
    backing = filesystem.open_owned(policy, path, writable=writable, max_bytes=filesystem.MAX_DISK_BYTES)
    flags = 0 if role == WORK else loop.LO_FLAGS_AUTOCLEAR
    flags |= 0 if writable else loop.LO_FLAGS_READ_ONLY
    try:
        held.append(loop.attach(backing, names.loop_label(vm_id, role), flags=flags))
    finally:
        os.close(backing)
    return os.fstat(held[-1]).st_rdev


def _require_valid(vm_id: names.VmId) -> None:
    said = devmapper.status(names.dm_name(vm_id))
    if not said[:1].isdigit():
        hint = "the overlay is full or damaged; delete the VM, or free space on the host"
        raise errors.OperationFailedError(f"the snapshot of VM {vm_id} is unusable: {said}", hint=hint)


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _uuid(vm_id: names.VmId) -> str:
    return f"BANGER-{vm_id}"
