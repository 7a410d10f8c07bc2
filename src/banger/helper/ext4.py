# SPDX-License-Identifier: MIT
"""The ext4 on a VM's block devices, edited and checked by e2fsprogs as the VM's uid."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from banger.contract import errors, names, privileged
from banger.helper import filesystem, program
from banger.helper import policy as policies

CHECK_DEADLINE_S: Final = 120.0
PATCH_DEADLINE_S: Final = 30.0
_EXT2_SUPER_MAGIC: Final = 0xEF53
_EXT2_VALID_FS: Final = 1
_INCOMPAT_RECOVER: Final = 0x4
_RO_COMPAT_ORPHAN_PRESENT: Final = 0x10000
_DIRECTORIES: Final = (names.GUEST_DIR, "/etc")


class _File(NamedTuple):
    mode: int
    data: bytes


def patch(policy: policies.Policy, request: privileged.PatchRoot, device: int, uid: int) -> None:
    """Writes hostname, guest configuration and, if asked, the guest binary; each is read back.

    An image that has our binary has the directories too. Only else are they looked for first, as that is a
    program more on the way to a boot, and debugfs damages the file system when it makes one that is there.
    """
    files = {
        f"{names.GUEST_DIR}/config": _File(0o644, _guest_config(request)),
        "/etc/hostname": _File(0o644, f"{request.hostname}\n".encode()),
    }
    if request.inject_guest:
        with open(policies.open_root_owned(policy.guest), "rb") as binary:
            files[names.GUEST_BINARY] = _File(0o755, binary.read())
    node = filesystem.open_node(policy, device, uid)
    try:
        failed = "not tried" if request.inject_guest else _write(node, uid, files, missing=())
        if failed:
            failed = _write(node, uid, files, missing=_missing_directories(node, uid))
    finally:
        os.close(node)
    if failed:
        raise errors.OperationFailedError(f"could not write {failed} into the root disk", vm=request.vm_id)
    _flush(policy, device)


def _write(node: int, uid: int, files: Mapping[str, _File], *, missing: Sequence[str]) -> str:
    """Empty when all is written; debugfs exits 0 always, so only what it reads back counts."""
    sources: list[int] = []
    lines = [f"mkdir {directory}" for directory in missing]
    try:
        for path, file in files.items():
            sources.append(_memory(file.data))
            lines += _write_commands(path, file.mode, sources[-1])
        ended = _debugfs(node, uid, lines, sources, ["-w"])
    finally:
        for fd in sources:
            os.close(fd)
    for path, file in files.items():
        if ended.status != 0 or f"debugfs: cat {path}\n".encode() + file.data not in ended.output:
            return f"{path}: {_complaint(ended.output)}"
    return ""


def _write_commands(path: str, mode: int, source: int) -> list[str]:
    directory, name = path.rsplit("/", 1)
    return [
        f"rm {path}",
        f"cd {directory}",
        f"write /proc/self/fd/{source} {name}",
        f"sif {path} mode 0{0o100000 | mode:o}",
        f"sif {path} uid 0",
        f"sif {path} gid 0",
        f"cat {path}",
    ]


def _missing_directories(node: int, uid: int) -> list[str]:
    ended = _debugfs(node, uid, [f"stat {directory}" for directory in _DIRECTORIES], [], [])
    answers = ended.output.split(b"debugfs: stat ")[1:]
    return [name for name, said in zip(_DIRECTORIES, answers, strict=False) if b"File not found" in said]


def _debugfs(
    node: int, uid: int, lines: Sequence[str], sources: Sequence[int], options: Sequence[str]
) -> program.Ended:
    script = _memory("".join(f"{line}\n" for line in lines).encode())
    try:
        arguments = [*options, "-f", f"/proc/self/fd/{script}", f"/proc/self/fd/{node}"]
        fds = [node, script, *sources]
        return program.run("debugfs", arguments, uid=uid, fds=fds, deadline_s=PATCH_DEADLINE_S)
    finally:
        os.close(script)


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


def check(policy: policies.Policy, device: int, uid: int) -> privileged.Check:
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
